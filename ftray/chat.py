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
from ftray.sandbox import Rendered, TooMuch, compiled
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
ANCHORS = ("\n", "x", "|", ".")  # in front of what goes on with a sequence; one that doesn't melt into it is taken


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
        self._template_text = _template_of(tokenizer)
        self._names = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.unknown_token = str(getattr(tokenizer, "unk_token", None) or "")
        self._missing_roles: dict[str, str | None] = {}
        self._inserts_prefix = self._finds_prefix()
        self._uses_marks = False
        self.template_hash = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
        self.stop_token_ids = self._find_stop_tokens()
        self._uses_marks = self._finds_other_marks()

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
            new = self._tokenize(text, is_first=not ids)
            ids += new
            mask += self._mask(new, supervised)
        return Encoded(ids, mask)

    def encode_examples(self, conversations: Sequence[Sequence[Message] | str]) -> list[Encoded | DataError]:
        """What `encode_example` (for turns) and `encode_text` (for a string) give or raise, for many at once, as arrays.

        Raises ModelError as `encode_text` does.
        """
        import numpy as np

        if self._inserts_prefix:
            return [self._encode_one(conversation) for conversation in conversations]
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
        ids: list[int] = []
        for text, _ in self._segments(messages, add_generation_prompt=True):
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
        return self._render(messages, add_generation_prompt).text

    @property
    def uses_marks(self) -> bool:
        """Whether the template's `{% generation %}` marks name other parts of the turns than text and end token."""
        return self._uses_marks

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
        return Encoded(np.asarray(found.input_ids, dtype=np.int32), np.asarray(found.loss_mask, dtype=np.bool_))

    def _segments(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[tuple[str, bool]]:
        """The rendered text, cut before and after each assistant turn; True marks turns that are learned."""
        rendered = self._render(messages, add_generation_prompt)
        full = rendered.text
        segments: list[tuple[str, bool]] = []
        done = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start = self._border(full, messages[:i], add_generation_prompt=True)
            end = self._border(full, messages[: i + 1], add_generation_prompt=False)
            segments += [(full[done:start], False)]
            done = start
            for mark in rendered.marks if self._uses_marks else ():
                low, high = max(mark[0], start), min(mark[1], end)
                if low < high:
                    segments += [(full[done:low], False), (full[low:high], message.train)]
                    done = high
            segments += [(full[done:end], message.train and not self._uses_marks)]
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
        template = self._template_text
        if self._uses_marks or not only_copies(template) or MARK in template or BLANK in template:
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
        text = self._render(head, add_generation_prompt).text
        if not full.startswith(text):
            raise DataError(
                f"the chat template rewrites earlier turns (turn {len(head)}), so that no prompt of the endpoint would "
                "match the training text; split the conversation into one record for each answer"
            )
        return len(text)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        if not messages:
            raise DataError("the conversation begins with the assistant; begin with a system or user turn")
        for role in {m.role for m in messages} & {"system", "tool"}:
            if (reason := self._why_not(role)) is not None:
                where = "the first user turn" if role == "system" else "a user turn"
                raise DataError(f"the chat template has no {role} role ({reason}); put its text into {where}")
        try:
            return self._run_template(messages, add_generation_prompt)
        except TooMuch as err:
            raise DataError(str(err)) from None
        except Exception as err:  # noqa: BLE001 - a template may raise anything: jinja's errors, or raise_exception()
            raise DataError(f"the chat template refuses the conversation: {_one_line(err)}") from None

    def _run_template(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return compiled(self._template_text).render(turns, add_generation_prompt, **self._names)

    def _why_not(self, role: str) -> str | None:
        """Why the template can't show turns of a role, seen on a probe; None if it can. Some leave them out in silence."""
        if role not in self._missing_roles:
            rest = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
            at = 0 if role == "system" else 2
            probe = [*rest[:at], Message(role, "7919"), *rest[at:]]
            self._missing_roles[role] = None
            try:
                self._run_template(rest, True)
                if "7919" not in self._run_template(probe, True).text:
                    self._missing_roles[role] = "it leaves such turns out"
            except Exception as err:  # noqa: BLE001 - as in `_render`
                if not _fails(lambda: self._run_template(rest, True)):
                    self._missing_roles[role] = _one_line(err)
        return self._missing_roles[role]

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
        if not compiled(self._template_text).has_marks:
            return False
        ours = self._masked(probe)
        self._uses_marks = True
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


def _template_of(tokenizer: Any) -> str:
    """The template's text; of several under names, the default one. Raises ModelError."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise ModelError(
                f"the tokenizer has several chat templates ({', '.join(sorted(found))}) and none is the default; name one so"
            )
        found = found["default"]
    return str(found)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _fails(action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception:  # noqa: BLE001 - as in `_render`
        return True
    return False


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """All control tokens (text → id): named ones and added ones that the tokenizer marks special."""
    added = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = {str(t): int(tokenizer.convert_tokens_to_ids(t)) for t in tokenizer.all_special_tokens}
    return {token: i for token, i in {**added, **named}.items() if token}
