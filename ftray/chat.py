"""A conversation → token ids and loss mask: the one place that knows chat templates.

Training, evaluation and serving all come through here, so that they give a conversation the same ids. Takes a
tokenizer, loads none; knows nothing of files, rows, models or HTTP.

How ids are made: the template is rendered once for the whole conversation and once up to each assistant turn with the
generation prompt. Where these texts end, the whole text is cut into segments, and each segment is tokenized by itself.
A prompt of the endpoint therefore is, id for id, the beginning of the training example with the same turns: no token
ever spans the border between what was asked and what is to be answered.

Many examples at once (`encode_examples`) take a shorter way to the same ids: one rendering serves all conversations of
the same roles, where the template only copies what the turns say (`template.only_copies`), and all segments are
tokenized in one call.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftray.errors import DataError, ModelError
from ftray.template import only_copies

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # Segments → their ids one after the other, int32, and where each begins, with the end: int64 [segments + 1].
    EncodeBatch = Callable[[Sequence[str]], tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]

ROLES = ("system", "user", "assistant", "tool")
MARK, BLANK = "\ue0f7", "\u2003"  # around the places of texts in a rendered shape; in no template that is used so
PLACE = re.compile(f"({BLANK}?){MARK}(\\d+){MARK}({BLANK}?)")
MAX_SHAPES = 1000


@dataclass(frozen=True)
class Message:
    """One turn. `train` is only looked at in assistant turns: False leaves the turn out of the loss."""

    role: str
    content: str
    train: bool = True


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, whether it is supervised (predicted under the loss).

    Lists; from `encode_examples` arrays, int32 and bool.
    """

    input_ids: list[int] | npt.NDArray[np.int32]
    loss_mask: list[bool] | npt.NDArray[np.bool_]


def read_messages(raw: object) -> list[Message]:
    """Reads OpenAI-style turns, `[{"role": …, "content": …, "train": …?}]`. Raises DataError saying which turn is wrong."""
    if not isinstance(raw, list) or not raw:
        raise DataError("messages must be a list with at least one turn")
    return [_read_turn(i, turn) for i, turn in enumerate(raw)]


def _read_turn(i: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"turn {i} must be an object with role and content")
    role, content = turn.get("role"), turn.get("content")
    train = turn.get("train", turn.get("weight") != 0)  # OpenAI's files say `weight: 0` for what isn't learned
    if role not in ROLES:
        raise DataError(f"turn {i} has the role {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"turn {i} ({role}) has no text; content must be a string")
    if not isinstance(train, bool):
        raise DataError(f"turn {i}: train must be true or false")
    if lost := [key for key in ("tool_calls", "function_call") if turn.get(key)]:
        raise DataError(f"turn {i} ({role}) has {lost[0]}, which would be lost; write the call into its content")
    return Message(role, content, train)


class ChatFormat:
    """A tokenizer's chat template, as ids.

    tokenizer: a transformers fast tokenizer with a chat template. encode_batch: a faster way to the same ids, for
    `encode_examples`. Raises ModelError when there is no template.
    """

    def __init__(self, tokenizer: Any, encode_batch: EncodeBatch | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the tokenizer has no chat template; use an instruct model, or add a template to the tokenizer"
            )
        self._tokenizer = tokenizer
        self._specials = _special_tokens(tokenizer)
        self._special_ids = frozenset(self._specials.values())
        self._special_starts = sorted({token[0] for token in self._specials})
        self._encode_batch = encode_batch or self._encode_one_by_one
        self._shapes: dict[tuple[tuple[str, bool], ...], _Shape | None] = {}
        self.template_hash = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
        self.stop_token_ids = self._find_stop_tokens()

    @property
    def identity(self) -> tuple[str, dict[str, int], tuple[int, ...]]:
        """What two formats that are the same have in common, beside their ids: template, special tokens, stops."""
        return self.template_hash, self._specials, self.stop_token_ids

    def encode_example(self, messages: Sequence[Message]) -> Encoded:
        """Ids of a whole conversation; supervised are the text and end token of each assistant turn with `train`.

        Raises DataError: no assistant turn to learn from, an empty answer, a special token inside a text, or a template
        that the conversation doesn't fit.
        """
        self._check_example(messages)
        ids: list[int] = []
        mask: list[bool] = []
        for text, supervised in self._segments(messages):
            new = self._tokenize(text)
            ids += new
            mask += self._mask(new, supervised)
        return Encoded(ids, mask)

    def encode_examples(self, conversations: Sequence[Sequence[Message] | str]) -> list[Encoded | DataError]:
        """What `encode_example` (for turns) and `encode_text` (for a string) give or raise, for many at once, as arrays.

        Raises ModelError as `encode_text` does.
        """
        import numpy as np

        texts: list[str] = []
        learned: list[bool] = []
        ends: list[int | DataError] = []  # of each conversation's segments in `texts`
        for conversation in conversations:
            try:
                if isinstance(conversation, str):
                    self._check_plain(conversation)
                    segments = [(conversation, True)]
                else:
                    self._check_example(conversation)
                    segments = self._segments_by_shape(conversation)
            except DataError as err:
                ends.append(err)
                continue
            for text, supervised in segments:
                if text:
                    texts.append(text)
                    learned.append(supervised)
            ends.append(len(texts))
        ids, offsets = self._encode_batch(texts)
        mask = self._mask_batch(ids, offsets, np.asarray(learned, dtype=np.bool_))
        places = offsets.tolist()
        found: list[Encoded | DataError] = []
        lo = 0
        for conversation, end in zip(conversations, ends, strict=True):
            if isinstance(end, DataError):
                found.append(end)
                continue
            hi = places[end]
            if isinstance(conversation, str):
                whole = np.append(ids[lo:hi], np.int32(self._tokenizer.eos_token_id))
                found.append(Encoded(whole, np.ones(len(whole), dtype=np.bool_)))
            else:
                found.append(Encoded(ids[lo:hi], mask[lo:hi]))
            lo = hi
        return found

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to and with the generation prompt, cut into segments as in training.

        Raises DataError as `encode_example` does, and when the last turn is the assistant's.
        """
        self._check(messages)
        if messages[-1].role == "assistant":
            raise DataError("the last turn is the assistant's; end with the turn to be answered")
        segments = self._segments(messages, add_generation_prompt=True)
        return [token for text, _ in segments for token in self._tokenize(text)]

    def encode_text(self, text: str) -> Encoded:
        """Ids of plain text followed by the end token; all supervised."""
        self._check_plain(text)
        ids = [*self._tokenize(text), self._tokenizer.eos_token_id]
        return Encoded(ids, [True] * len(ids))

    def decode(
        self, ids: Sequence[int] | npt.NDArray[np.int32], before: Sequence[int] | npt.NDArray[np.int32] = ()
    ) -> str:
        """Text of ids, special tokens shown. before: ids that they follow, of which nothing is in the result."""
        whole, head = (
            str(
                self._tokenizer.decode(
                    [int(i) for i in part], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
            for part in ([*before, *ids], before)
        )
        # A character of several tokens may be cut between the two: then there is a stand-in for it at the end of head.
        return whole[len(head) :] if whole.startswith(head) else whole[len(head.rstrip("\ufffd")) :]

    def is_special(self, token: int) -> bool:
        """Whether an id is a control token."""
        return token in self._special_ids

    def _segments(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[tuple[str, bool]]:
        """The rendered text, cut before and after each assistant turn; True marks turns that are learned."""
        full = self._render(messages, add_generation_prompt)
        segments: list[tuple[str, bool]] = []
        done = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start = self._border(full, messages[:i], add_generation_prompt=True)
            end = self._border(full, messages[: i + 1], add_generation_prompt=False)
            segments += [(full[done:start], False), (full[start:end], message.train)]
            done = end
        return [*segments, (full[done:], False)]

    def _segments_by_shape(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """`_segments(messages)`, from a rendering of other texts in the same roles where that is known to be the same."""
        key = tuple([(m.role, bool(m.content)) for m in messages])
        if key not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._find_shape(key)
        shape = self._shapes[key]
        if shape is None:
            return self._segments(messages)
        segments = []
        for parts, turn in shape:
            text = "".join([part if isinstance(part, str) else part.of(messages) for part in parts])
            segments.append((text, turn is not None and messages[turn].train))
        return segments

    def _find_shape(self, key: tuple[tuple[str, bool], ...]) -> _Shape | None:
        template = str(self._tokenizer.chat_template)
        if not only_copies(template) or MARK in template or BLANK in template:
            return None
        texts = [f"{BLANK}{MARK}{i}{MARK}{BLANK}" if said else "" for i, (_, said) in enumerate(key)]
        try:
            segments = self._segments([Message(role, text) for (role, _), text in zip(key, texts, strict=True)])
        except DataError:
            return None
        turns = [i for i, (role, _) in enumerate(key) if role == "assistant"]
        shape: list[tuple[list[str | _Place], int | None]] = []
        for n, (text, _) in enumerate(segments):
            pieces = PLACE.split(text)  # literal, blank, number, blank, literal, …
            parts: list[str | _Place] = [pieces[0]]
            for before, number, after, literal in zip(*(pieces[k::4] for k in (1, 2, 3, 4)), strict=True):
                if before != after:
                    return None  # trimmed on one side, or together with what stands beside it
                parts += [_Place(int(number), trimmed=not before), literal]
            shape.append(([p for p in parts if p != ""], turns[n // 2] if n % 2 else None))
        return shape

    def _border(self, full: str, head: Sequence[Message], add_generation_prompt: bool) -> int:
        text = self._render(head, add_generation_prompt)
        if not full.startswith(text):
            raise DataError(
                f"the chat template rewrites earlier turns (turn {len(head)}), so that no prompt of the endpoint would "
                "match the training text; split the conversation into one record for each answer"
            )
        return len(text)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if not messages:
            raise DataError("the conversation begins with the assistant; begin with a system or user turn")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except Exception as err:  # noqa: BLE001 - a template may raise anything: jinja's errors, or raise_exception()
            raise DataError(f"the chat template refuses the conversation: {' '.join(str(err).split())[:200]}") from None

    def _tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _encode_one_by_one(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        import numpy as np

        ids = [self._tokenize(text) for text in texts]
        flat = np.fromiter((i for each in ids for i in each), dtype=np.int32)
        return flat, np.cumsum([0, *map(len, ids)])

    def _mask_batch(
        self, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], learned: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """`_mask` of every segment."""
        import numpy as np

        table = np.zeros(max(self._special_ids, default=0) + 2, dtype=np.bool_)
        table[list(self._special_ids)] = True
        specials = np.flatnonzero(table[np.minimum(ids, len(table) - 1)])
        starts, ends = offsets[:-1][learned], offsets[1:][learned]
        starts, ends = starts[ends > starts], ends[ends > starts]
        before = np.searchsorted(specials, ends) - 1  # the last special token before the segment's end
        last = np.concatenate([specials, [-1]])[before]
        last = np.where(last >= starts, last, ends - 1)
        steps = np.zeros(len(ids) + 1, dtype=np.int8)
        steps[starts] += 1
        steps[last + 1] -= 1
        return np.cumsum(steps[:-1], dtype=np.int8).astype(np.bool_)

    def _mask(self, ids: list[int], supervised: bool) -> list[bool]:
        """Supervised up to and with the last special token of the turn: what templates write after it is theirs."""
        if not supervised:
            return [False] * len(ids)
        ends = [i for i, token in enumerate(ids) if token in self._special_ids]
        last = ends[-1] if ends else len(ids) - 1
        return [i <= last for i in range(len(ids))]

    def _check_example(self, messages: Sequence[Message]) -> None:
        self._check(messages)
        if not any(m.role == "assistant" and m.train for m in messages):
            raise DataError("there is no assistant turn to learn from")

    def _check_plain(self, text: str) -> None:
        if not text:
            raise DataError("the text is empty")
        if self._tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token, so that plain text can't be learned; use another base")
        self._check_text(text, "the text")

    def _check(self, messages: Sequence[Message]) -> None:
        for i, message in enumerate(messages):
            if not self._is_plain(message.content):
                self._check_text(message.content, f"turn {i} ({message.role})")
            if message.role == "assistant" and not message.content.strip():
                raise DataError(f"turn {i} (assistant) is empty")

    def _is_plain(self, text: str) -> bool:
        """Nothing in it that `_check_text` could refuse, seen at a glance."""
        return text.isascii() and not any(start in text for start in self._special_starts)

    def _check_text(self, text: str, where: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where} has half of a surrogate pair, which is no character; remove it") from None
        # Inside a text such a string would become the control token itself: a way to forge turns.
        for token in self._specials:
            if token in text:
                raise DataError(f"{where} contains the special token {token}; remove it from the text")

    def _find_stop_tokens(self) -> tuple[int, ...]:
        """End token of an assistant turn, read off a rendered probe, and the tokenizer's own end token."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        try:
            text, _ = self._segments(probe)[1]
        except DataError as err:
            raise ModelError(f"the tokenizer's chat template can't be used: {err}") from None
        ends = [token for token in self._tokenize(text) if token in self._special_ids]
        eos = self._tokenizer.eos_token_id
        return tuple(dict.fromkeys([*ends[-1:], *([eos] if eos is not None else [])]))


@dataclass(frozen=True)
class _Place:
    """Where a turn's text stands in a segment."""

    turn: int
    trimmed: bool

    def of(self, messages: Sequence[Message]) -> str:
        text = messages[self.turn].content
        return text.strip() if self.trimmed else text


if TYPE_CHECKING:
    _Shape = list[tuple[list[str | _Place], int | None]]  # segments: their parts, and whose turn each is


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """All control tokens (text → id): named ones and added ones that the tokenizer marks special."""
    added = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = {str(t): int(tokenizer.convert_tokens_to_ids(t)) for t in tokenizer.all_special_tokens}
    return {token: i for token, i in {**added, **named}.items() if token}
