"""Turns tokens into text that can be shown at once. Knows no models, engines or HTTP; `decode` is passed in.

Two things must not be shown early: a character whose bytes are spread over tokens, and the beginning of a possible stop
string.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from ftray.engine.protocol import FinishReason

_HALF = "\ufffd"  # what decoders write for bytes that make no character (yet)


def text_decoder(tokenizer: Any, visible_ids: Collection[int] = ()) -> Callable[[list[int]], str]:
    """Ids → text as the tokenizer decodes them, without special tokens other than visible_ids."""
    if not visible_ids:
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    hidden = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - set(visible_ids)

    def decode(ids: list[int]) -> str:
        shown = [i for i in ids if i not in hidden]
        return str(tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


class Detokenizer:
    """The growing text of one answer.

    The texts of all pushes and `finish` together are `decode` of all ids, cut before the first stop string, without an
    incomplete
    character at the end.

    Args:
        decode: Ids → text, see `text_decoder`.
        stop: Stop strings.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []  # tokens since two borders ago; earlier ones can't change the text any more
        self._num_shown = 0  # of these, how many are in the text already
        self._held = ""  # decoded, but may turn out to begin a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became final with this token; "" after a stop string."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        # A token's text depends on its left neighbours (leading spaces), so decode with some and take the difference.
        before = self._decode(self._ids[: self._num_shown])
        text = self._decode(self._ids)
        if len(text) <= len(before) or text.endswith(_HALF):
            return ""
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """The rest of the text, without an incomplete character."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[: self._num_shown])
        rest = self._release(self._decode(self._ids)[len(before) :].rstrip(_HALF))
        held, self._held = self._held, ""
        return rest + held

    def _release(self, new: str) -> str:
        text = self._held + new
        starts = [i for i in (text.find(stop) for stop in self._stop) if i >= 0]
        if starts:
            self.stopped = True
            self._held = ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def read_tokens(
    stream: Detokenizer, new: Sequence[int], end_ids: Collection[int], *, is_last: bool
) -> tuple[str, int, FinishReason | None]:
    """The text of an answer's next tokens, the number of tokens that belong to it, and the reason if it ended.

    It ends with an end token (a token of the answer, but without text), a stop string, or if `is_last` says that no more
    tokens come.
    """
    text, taken = "", 0
    reason: FinishReason | None = "length" if is_last else None
    for token in new:
        taken += 1
        if token in end_ids:
            reason = "stop"
            break
        text += stream.push(token)
        if stream.stopped:
            reason = "stop"
            break
    return (text + stream.finish() if reason else text), taken, reason


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
