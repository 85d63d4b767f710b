"""Segments of a conversation → token ids, and which of them are learned.

Many examples at once (`encode_examples`) take a shorter way to the same ids: one rendering serves all conversations of
the same roles, where the template only copies what the turns say (`template.only_copies`), and all segments are
tokenized in one call.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ftray.chat.messages import Message
from ftray.chat.segments import Document, TemplateSegmenter
from ftray.chat.special_tokens import find_normalizer, forgeries, special_tokens
from ftray.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # Segments → their ids one after the other, int32, and where each begins, with the end: int64 [segments + 1].
    EncodeBatch = Callable[[Sequence[str]], tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]

ANCHORS = ("\n", "x", "|", ".")  # in front of what goes on with a sequence; one that doesn't melt into it is taken


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, whether it is supervised (predicted under the loss).

    Lists; from `encode_examples` arrays, int32 and bool. starts: where its documents begin; it has several where the
    template rewrites earlier turns, one for each answer, and no token of one may see another.
    """

    input_ids: list[int] | npt.NDArray[np.int32]
    loss_mask: list[bool] | npt.NDArray[np.bool_]
    starts: tuple[int, ...] = (0,)

    def documents(self) -> list[tuple[Any, Any]]:
        """(ids, mask) of each document."""
        if len(self.starts) == 1:
            return [(self.input_ids, self.loss_mask)]
        borders = pairwise([*self.starts, len(self.input_ids)])
        return [(self.input_ids[a:b], self.loss_mask[a:b]) for a, b in borders]

    @property
    def longest(self) -> int:
        """Tokens of its longest document."""
        return max(b - a for a, b in pairwise([*self.starts, len(self.input_ids)]))


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
        self._specials = special_tokens(tokenizer)
        self._special_ids = frozenset(self._specials.values())
        self._special_starts = sorted({token[0] for token in self._specials})
        self._normalize = find_normalizer(tokenizer)
        self._keeps_ascii = self._normalize is None or self._normalize.keeps_ascii
        self._forgeries = forgeries(tokenizer, self._specials, self._normalize)
        self._encode_batch = encode_batch or self._encode_one_by_one
        names = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
        self._cutter = TemplateSegmenter(template_of(tokenizer), names)
        self.unknown_token = str(getattr(tokenizer, "unk_token", None) or "")
        self._inserts_prefix = self._finds_prefix()
        self.template_hash = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
        self.stop_token_ids = self._find_stop_tokens()
        self._cutter.uses_marks = self._finds_other_marks()

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
        starts = []
        for document in self._cutter.cut_example(messages):
            starts.append(len(ids))
            for text, supervised in document:
                new = self._tokenize(text, is_first=len(ids) == starts[-1])
                ids += new
                mask += self._mask(new, supervised)
        return Encoded(ids, mask, tuple(starts))

    def encode_examples(self, conversations: Sequence[Sequence[Message] | str]) -> list[Encoded | DataError]:
        """What `encode_example` (for turns) and `encode_text` (for a string) give or raise, for many at once, as arrays.

        Raises ModelError as `encode_text` does.
        """
        import numpy as np

        if self._inserts_prefix:
            return [self._encode_one(conversation) for conversation in conversations]
        texts: list[str] = []
        learned: list[bool] = []
        cuts: list[
            list[int] | DataError
        ] = []  # of each conversation: where its documents begin in `texts`, and the end
        for conversation in conversations:
            documents = self._documents(conversation)
            if isinstance(documents, DataError):
                cuts.append(documents)
                continue
            begins = [len(texts)]
            for document in documents:
                for text, supervised in document:
                    if text:
                        texts.append(text)
                        learned.append(supervised)
                begins.append(len(texts))
            cuts.append(begins)
        ids, offsets = self._encode_batch(texts)
        mask = self._mask_batch(ids, offsets, np.asarray(learned, dtype=np.bool_))
        places = offsets.tolist()
        found: list[Encoded | DataError] = []
        for conversation, cut in zip(conversations, cuts, strict=True):
            if isinstance(cut, DataError):
                found.append(cut)
                continue
            lo, hi = places[cut[0]], places[cut[-1]]
            if isinstance(conversation, str):
                whole = np.append(ids[lo:hi], np.int32(self._tokenizer.eos_token_id))
                found.append(Encoded(whole, np.ones(len(whole), dtype=np.bool_)))
            else:
                found.append(Encoded(ids[lo:hi], mask[lo:hi], tuple([places[at] - lo for at in cut[:-1]])))
        return found

    def _documents(self, conversation: Sequence[Message] | str) -> list[Document] | DataError:
        try:
            if isinstance(conversation, str):
                self._check_plain(conversation)
                return [[(conversation, True)]]
            self._check_example(conversation)
            return self._cutter.cut_by_shape(conversation)
        except DataError as err:
            return err

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to and with the generation prompt, cut into segments as in training.

        Raises DataError as `encode_example` does, and when the last turn is the assistant's.
        """
        self._check(messages)
        if messages[-1].role == "assistant":
            raise DataError("the last turn is the assistant's; end with the turn to be answered")
        ids: list[int] = []
        for text in self._cutter.cut_prompt(messages):
            ids += self._tokenize(text, is_first=not ids)
        return ids

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
                    [int(i) for i in part],
                    skip_special_tokens=False,
                    clean_up_tokenization_spaces=False,
                )
            )
            for part in ([*before, *ids], before)
        )
        # A character of several tokens may be cut between the two: then there is a stand-in for it at the end of head.
        return whole[len(head) :] if whole.startswith(head) else whole[len(head.rstrip("\ufffd")) :]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it. Raises DataError where it can't."""
        return self._cutter.render(messages, add_generation_prompt).text

    @property
    def uses_marks(self) -> bool:
        """Whether the template's `{% generation %}` marks name other parts of the turns than text and end token."""
        return self._cutter.uses_marks

    def can_write(self, character: str) -> bool:
        """Whether ids of the character decode to it again; some vocabularies have none for rare ones."""
        return character in self.decode(self._plain_ids(f"x{character}x"))

    def is_special(self, token: int) -> bool:
        """Whether an id is a control token."""
        return token in self._special_ids

    def _encode_one(self, conversation: Sequence[Message] | str) -> Encoded | DataError:
        """One of `encode_examples`, by itself."""
        import numpy as np

        try:
            plain = isinstance(conversation, str)
            found = self.encode_text(str(conversation)) if plain else self.encode_example(conversation)  # type: ignore[arg-type]
        except DataError as err:
            return err
        ids, mask = np.asarray(found.input_ids, dtype=np.int32), np.asarray(found.loss_mask, dtype=np.bool_)
        return Encoded(ids, mask, found.starts)

    def _tokenize(self, text: str, is_first: bool = True) -> list[int]:
        """Ids of a text: one that begins a sequence, or else one that goes on with it.

        Some tokenizers (sentencepiece's) put a space in front of whatever they are given. What goes on with a sequence
        is given to them behind another character, whose ids are then taken off.
        """
        if not text:
            return []
        if is_first or not self._inserts_prefix:
            return self._plain_ids(text)
        for anchor in ANCHORS:
            head, whole = self._plain_ids(anchor), self._plain_ids(anchor + text)
            if whole[: len(head)] == head and self.decode(whole[len(head) :], before=head) == text:
                return whole[len(head) :]
        # Nothing decodes to just the text (a character that the vocabulary lacks): then a border between tokens will do.
        head, whole = self._plain_ids(ANCHORS[0]), self._plain_ids(ANCHORS[0] + text)
        return whole[len(head) :] if whole[: len(head)] == head else self._plain_ids(text)

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _finds_prefix(self) -> bool:
        """Whether a text by itself gets other ids than the same text behind a newline: then a prefix was put in front."""
        for probe in ("a", "the"):
            alone = self._plain_ids(probe)
            for anchor in ANCHORS:
                head, whole = self._plain_ids(anchor), self._plain_ids(anchor + probe)
                if whole[: len(head)] == head and whole[len(head) :] == alone:
                    break
            else:
                return True
        return False

    def _finds_other_marks(self) -> bool:
        """Whether the template's `{% generation %}` marks name other parts of the turns than text and end token.

        Raises ModelError where they leave out the end token: no answer would ever end.
        """
        probe = [Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
        if not self._cutter.has_marks:
            return False
        ours = self._masked(probe)
        self._cutter.uses_marks = True
        theirs = self._masked(probe)
        for learned in (theirs, self._masked(probe[:2])):
            if not learned or learned[-1] not in self.stop_token_ids:
                raise ModelError(
                    "the chat template's {% generation %} marks leave out the end token of the answer, so that no answer "
                    "would end; put it inside the marks, or remove them"
                )
        return theirs != ours

    def _masked(self, messages: Sequence[Message]) -> list[int]:
        """What is learned of a conversation."""
        encoded = self.encode_example(messages)
        return [int(t) for t, learned in zip(encoded.input_ids, encoded.loss_mask, strict=True) if learned]

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
        for i, message in enumerate(messages):
            self._check_writable(message.content, f"turn {i} ({message.role})")
        if not any(m.role == "assistant" and m.train for m in messages):
            raise DataError("there is no assistant turn to learn from")

    def _check_plain(self, text: str) -> None:
        if not text:
            raise DataError("the text is empty")
        if self._tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token, so that plain text can't be learned; use another base")
        self._check_text(text, "the text")
        self._check_writable(text, "the text")

    def _check(self, messages: Sequence[Message]) -> None:
        for i, message in enumerate(messages):
            if not self._is_plain(message.content):
                self._check_text(message.content, f"turn {i} ({message.role})")
            if message.role == "assistant" and not message.content.strip():
                raise DataError(f"turn {i} (assistant) is empty")

    def _is_plain(self, text: str) -> bool:
        """Nothing in it that `_check_text` could refuse, seen at a glance."""
        return self._keeps_ascii and text.isascii() and not any(start in text for start in self._special_starts)

    def _check_writable(self, text: str, where: str) -> None:
        if self._unwritable is not None and (found := self._unwritable.search(text)):
            raise DataError(
                f"{where} contains the control character U+{ord(found[0]):04X}, which the tokenizer has no token for, so that "
                "it would be lost; remove it"
            )

    @cached_property
    def _unwritable(self) -> re.Pattern[str] | None:
        """Control characters that the vocabulary lacks: ids would leave them out in silence."""
        lost = [c for c in map(chr, range(32)) if not self.can_write(c)]
        return re.compile("[" + "".join(map(re.escape, lost)) + "]") if lost else None

    def _check_text(self, text: str, where: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where} has half of a surrogate pair, which is no character; remove it") from None
        # Inside a text such a string would become the control token itself: a way to forge turns.
        for token in self._specials:
            if token in text:
                raise DataError(f"{where} contains the special token {token}; remove it from the text")
        if self._normalize is None:
            return
        normalized = self._normalize(text)
        for written, token in self._forgeries.items():
            if written in normalized:
                raise DataError(
                    f"{where} contains the special token {token} once the tokenizer has normalized it; remove it from the text"
                )

    def _find_stop_tokens(self) -> tuple[int, ...]:
        """End token of an assistant turn, read off a rendered probe, and the tokenizer's own end token."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        try:
            (document,) = self._cutter.cut_example(probe)
        except DataError as err:
            raise ModelError(f"the tokenizer's chat template can't be used: {err}") from None
        (text,) = [text for text, learned in document if learned]
        ends = [token for token in self._tokenize(text) if token in self._special_ids]
        eos = self._tokenizer.eos_token_id
        return tuple(dict.fromkeys([*ends[-1:], *([eos] if eos is not None else [])]))


def template_of(tokenizer: Any) -> str:
    """The template's text; of several under names, the default one. Raises ModelError."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise ModelError(
                f"the tokenizer has several chat templates ({', '.join(sorted(found))}) and none is the default; name one so"
            )
        found = found["default"]
    return str(found)
