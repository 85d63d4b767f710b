"""Turns the segments of a conversation into token ids and a loss mask.

`encode_examples` gives the same ids for many examples at once, faster: one rendering serves all conversations with the same
roles if the template only copies the messages' texts (`segments.cut_by_shape`), and all segments are tokenized in one call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftray.chat.answer_text import ANSWERED, CALLED, CALLED_TWICE
from ftray.chat.encoded import Encoded, ExpectedDocument
from ftray.chat.loss_mask import LossMask
from ftray.chat.messages import Conversation, Message
from ftray.chat.placeholders import ShapeCache
from ftray.chat.renderer import TemplateRenderer, template_of, texts_of
from ftray.chat.segments import WHOLE, Document, TemplateSegmenter
from ftray.chat.special_tokens import TextChecker, special_tokens
from ftray.chat.spelled_tokens import SpelledTokens
from ftray.chat.train_on import Ranges, TrainOn
from ftray.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # Segments → their concatenated ids, int32, and the offset of each, with the end: int64 [segments + 1].
    EncodeBatch = Callable[[Sequence[str]], tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]

ANCHORS = ("\n", "x", "|", ".")  # put before a text that continues a sequence; one that does not merge with it is used


class ChatFormat:
    """A tokenizer with its chat template.

    Args:
        tokenizer: A fast tokenizer of transformers, with a chat template.
        encode_batch: A faster way to the same ids, for `encode_examples`.
        train_on: The parts of answers to train on.

    Raises:
        ModelError: There is no chat template, or it cannot be used.
    """

    def __init__(self, tokenizer: Any, encode_batch: EncodeBatch | None = None, train_on: TrainOn = WHOLE) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the tokenizer has no chat template; use an instruct model, or add a template to the tokenizer"
            )
        self._tokenizer = tokenizer
        self._specials = special_tokens(tokenizer)
        self._special_ids = frozenset(self._specials.values())
        self._checker = TextChecker(tokenizer, self._specials, self.can_write)
        self._encode_batch = encode_batch or self._encode_one_by_one
        names = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
        renderer = TemplateRenderer(template_of(tokenizer), names)
        self._segmenter = TemplateSegmenter(renderer, self._specials, train_on)
        self._spelled = SpelledTokens(tokenizer, self._specials)
        self._shapes = ShapeCache(self._segmenter)
        self._loss_mask = LossMask(self._special_ids, self._continued, self._checker.normalized)
        self.unknown_token = str(getattr(tokenizer, "unk_token", None) or "")
        self._inserts_prefix = self._finds_prefix()
        self.text_prefix = self._find_text_prefix()
        self.template_hash = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
        self.stop_token_ids = self._find_stop_tokens()
        self._segmenter.uses_marks = self._finds_other_marks()

    @property
    def identity(self) -> tuple[str, dict[str, int], tuple[int, ...], tuple[int, ...]]:
        """Template, special tokens, stop tokens and text prefix: equal for two formats that differ in their ids at most."""
        return self.template_hash, self._specials, self.stop_token_ids, self.text_prefix

    def encode_example(self, conversation: Conversation) -> Encoded:
        """Ids of a conversation. The text and end token of each assistant message with `train` are trained on.

        Raises:
            DataError: There is no assistant message to train on, an answer is empty, a text contains a special token, or the
                template refuses the conversation.
        """
        self._check_example(conversation)
        ids: list[int] = []
        mask: list[bool] = []
        starts = []
        for document in self._segmenter.cut_example(conversation):
            starts.append(len(ids))
            for text, trained in document:
                new = self._tokenize(text, is_first=len(ids) == starts[-1])
                ids += new
                mask += self._loss_mask.of_segment(new, text, trained)
        return Encoded(ids, mask, tuple(starts))

    def encode_examples(self, conversations: Sequence[Conversation | str]) -> list[Encoded | DataError]:
        """Results or errors of `encode_example` and `encode_text` (for a string), for many at once, as arrays.

        Raises:
            ModelError: As `encode_text`.
        """
        import numpy as np

        if self._inserts_prefix:
            return [self._encode_one(conversation) for conversation in conversations]
        texts: list[str] = []
        trained_of: list[bool | Ranges] = []
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
                for text, trained in document:
                    if text:
                        texts.append(text)
                        trained_of.append(trained)
                begins.append(len(texts))
            cuts.append(begins)
        ids, offsets = self._encode_batch(texts)
        mask = self._loss_mask.of_batch(ids, offsets, texts, trained_of)
        places = offsets.tolist()
        results: list[Encoded | DataError] = []
        for conversation, cut in zip(conversations, cuts, strict=True):
            if isinstance(cut, DataError):
                results.append(cut)
                continue
            lo, hi = places[cut[0]], places[cut[-1]]
            if isinstance(conversation, str):
                head, tail = np.array(self.text_prefix, np.int32), np.array([self._tokenizer.eos_token_id], np.int32)
                whole = np.concatenate([head, ids[lo:hi], tail])
                results.append(Encoded(whole, np.arange(len(whole)) >= len(self.text_prefix)))
            else:
                results.append(Encoded(ids[lo:hi], mask[lo:hi], tuple([places[at] - lo for at in cut[:-1]])))
        return results

    def _documents(self, conversation: Conversation | str) -> list[Document] | DataError:
        try:
            if isinstance(conversation, str):
                self._check_plain(conversation)
                return [[(conversation, True)]]
            self._check_example(conversation)
            return self._shapes.cut(conversation)
        except DataError as err:
            return err

    def encode_prompt(
        self, conversation: Conversation, *, is_request: bool = False, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids up to and including the generation prompt, cut into segments as in training.

        Args:
            conversation: Messages and tools.
            is_request: Whether it is from a client: its texts may spell special tokens, which are encoded as plain text, and
                earlier answers may be empty.
            variables: Values for `variables` of the template.

        Raises:
            DataError: As `encode_example`, or the last message is the assistant's.
        """
        if is_request:
            conversation = self._spelled.hide(conversation)
        self._check(conversation, allows_empty=is_request)
        if conversation.messages[-1].role == "assistant":
            raise DataError("the last turn is the assistant's; end with the turn that it should answer")
        segments = self._segmenter.with_variables(variables or {}).cut_prompt(conversation)
        if is_request:
            self._spelled.check_shown(conversation, "".join(segments))
        ids: list[int] = []
        for segment in segments:
            for text, is_spelling in self._spelled.split(segment) if is_request else ((segment, False),):
                if is_spelling:
                    ids += self._spelled.encode(text, anchor=ANCHORS[0] if ids and self._inserts_prefix else "")
                else:
                    ids += self._tokenize(text, is_first=not ids)
        return ids

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template uses besides messages, tools and special tokens: `enable_thinking`, for example."""
        return self._segmenter.renderer.variables

    def encode_text(self, text: str) -> Encoded:
        """Ids of `text_prefix`, plain text and the end token. All but the prefix are trained on."""
        self._check_plain(text)
        ids = [*self._tokenize(text), self._tokenizer.eos_token_id]
        return Encoded([*self.text_prefix, *ids], [False] * len(self.text_prefix) + [True] * len(ids))

    def decode(
        self, ids: Sequence[int] | npt.NDArray[np.int32], before: Sequence[int] | npt.NDArray[np.int32] = ()
    ) -> str:
        """The text of ids, with special tokens.

        Args:
            ids: The ids.
            before: Preceding ids, whose text is not in the result.
        """
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
        # If a character of several tokens is cut between the two, head ends with a replacement character.
        return whole[len(head) :] if whole.startswith(head) else whole[len(head.rstrip("\ufffd")) :]

    def decode_many(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The texts of many sequences, with special tokens, in one call."""
        backend = self._tokenizer.backend_tokenizer
        return list(backend.decode_batch([list(ids) for ids in sequences], skip_special_tokens=False))

    def expected(self, conversation: Conversation) -> list[ExpectedDocument]:
        """The texts that the ids of a conversation must decode to, each made by renderings of this conversation alone.

        Raises:
            DataError: As `encode_example`.
        """
        return [
            ExpectedDocument(
                "".join(text for text, _ in document),
                [part for text, trained in document for part in self._segmenter.trained_texts(text, trained)],
                self._segmenter.answer_prompt,
            )
            for document in self._segmenter.cut_example(conversation)
        ]

    def trained_turns(self, conversation: Conversation) -> list[int]:
        """The numbers of the turns whose answers are trained on."""
        return self._segmenter.trained_turns(conversation)

    def normalized(self, text: str) -> str:
        """A text as its ids decode, if the tokenizer composes or decomposes characters."""
        return self._checker.normalized(text)

    def without_specials(self, text: str) -> str:
        """A text without special tokens and the white space around them, which some tokenizers do not keep."""
        return self._segmenter.without_specials(text)

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The conversation as the template renders it. Raises DataError if it cannot."""
        return self._segmenter.render(conversation, add_generation_prompt).text

    @property
    def uses_marks(self) -> bool:
        """Whether the template's `{% generation %}` blocks select other parts of the messages than text and end token."""
        return self._segmenter.uses_marks

    def can_write(self, character: str) -> bool:
        """Whether the character's ids decode to it again. Some vocabularies lack rare characters."""
        return character in self.decode(self._plain_ids(f"x{character}x"))

    def is_special(self, token: int) -> bool:
        """Whether an id is a control token."""
        return token in self._special_ids

    def _encode_one(self, conversation: Conversation | str) -> Encoded | DataError:
        """One conversation of `encode_examples`."""
        import numpy as np

        try:
            encoded = (
                self.encode_text(conversation) if isinstance(conversation, str) else self.encode_example(conversation)
            )
        except DataError as err:
            return err
        ids, mask = np.asarray(encoded.input_ids, dtype=np.int32), np.asarray(encoded.loss_mask, dtype=np.bool_)
        return Encoded(ids, mask, encoded.starts)

    def _tokenize(self, text: str, is_first: bool = True) -> list[int]:
        """Ids of a text that begins a sequence (is_first) or continues one.

        Some tokenizers (sentencepiece's) put a space in front of every text. A text that continues a sequence is tokenized
        after another character, whose ids are then removed.
        """
        if not text:
            return []
        if is_first or not self._inserts_prefix:
            return self._plain_ids(text)
        for anchor in ANCHORS:
            head, whole = self._plain_ids(anchor), self._plain_ids(anchor + text)
            if whole[: len(head)] == head and self.decode(whole[len(head) :], before=head) == text:
                return whole[len(head) :]
        # No anchor gives exactly the text (the vocabulary lacks a character): any border between tokens will do.
        head, whole = self._plain_ids(ANCHORS[0]), self._plain_ids(ANCHORS[0] + text)
        return whole[len(head) :] if whole[: len(head)] == head else self._plain_ids(text)

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _continued(self, ids: list[int]) -> str:
        """The text of ids that continue a sequence."""
        return self.decode(ids, before=self._plain_ids(ANCHORS[0]) if self._inserts_prefix else ())

    def _finds_prefix(self) -> bool:
        """Whether a text alone gets other ids than after a newline: then the tokenizer puts a prefix in front."""
        for probe in ("a", "the"):
            alone = self._plain_ids(probe)
            for anchor in ANCHORS:
                head, whole = self._plain_ids(anchor), self._plain_ids(anchor + probe)
                if whole[: len(head)] == head and whole[len(head) :] == alone:
                    break
            else:
                return True
        return False

    def _find_text_prefix(self) -> tuple[int, ...]:
        """The tokens that the tokenizer puts in front of every text, BOS for most. Models expect them there."""
        whole, plain = list(self._tokenizer("a", add_special_tokens=True)["input_ids"]), self._plain_ids("a")
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:at])

    def _finds_other_marks(self) -> bool:
        """Whether the template's `{% generation %}` blocks select other parts of the messages than text and end token.

        Raises:
            ModelError: They leave out the end token, so no answer would ever end.
        """
        turns = [Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
        probe = Conversation(tuple(turns))
        if not self._segmenter.has_marks:
            return False
        ours = self._masked(probe)
        self._segmenter.uses_marks = True
        theirs = self._masked(probe)
        for trained in (theirs, self._masked(probe.until(2))):
            if not trained or trained[-1] not in self.stop_token_ids:
                raise ModelError(
                    "the chat template's {% generation %} marks leave out the end token of the answer, so no answer "
                    "would end; put it inside the marks, or remove them"
                )
        return theirs != ours

    def _masked(self, conversation: Conversation) -> list[int]:
        """The ids of a conversation that are trained on."""
        encoded = self.encode_example(conversation)
        return [int(t) for t, trained in zip(encoded.input_ids, encoded.loss_mask, strict=True) if trained]

    def _encode_one_by_one(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        import numpy as np

        ids = [self._tokenize(text) for text in texts]
        flat = np.fromiter((i for each in ids for i in each), dtype=np.int32)
        return flat, np.cumsum([0, *map(len, ids)])

    def _check_example(self, conversation: Conversation) -> None:
        self._check(conversation)
        for i, message in enumerate(conversation.messages):
            self._checker.check_writable(message.content, f"turn {i} ({message.role})")
        if not conversation.is_plain:
            for i, what, text in texts_of(conversation):
                self._checker.check_writable(text, what if i < 0 else f"turn {i} ({what})")
        if not self._segmenter.trained_turns(conversation):
            raise DataError("there is no assistant turn to train on")

    def _check_plain(self, text: str) -> None:
        if not text:
            raise DataError("the text is empty")
        if self._tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token, so that plain text can't be trained; use another base")
        self._checker.check(text, "the text")
        self._checker.check_writable(text, "the text")

    def _check(self, conversation: Conversation, *, allows_empty: bool = False) -> None:
        for i, message in enumerate(conversation.messages):
            if not self._checker.is_plain(message.content):
                self._checker.check(message.content, f"turn {i} ({message.role})")
            if message.role == "assistant" and not (allows_empty or message.content.strip() or message.tool_calls):
                raise DataError(f"turn {i} (assistant) is empty")
            if message.weight != 1:
                raise DataError(f"turn {i} (assistant) has the weight {message.weight}; only 0 and 1 are supported")
        if not conversation.is_plain:
            for i, what, text in texts_of(conversation):
                if not self._checker.is_plain(text):
                    self._checker.check(text, what if i < 0 else f"turn {i} ({what})")

    def _find_stop_tokens(self) -> tuple[int, ...]:
        """The end tokens of an answer and of tool calls, from rendered probes, and the tokenizer's own end token."""
        ends: list[int] = []
        renderer = self._segmenter.renderer
        segmenter, shape = TemplateSegmenter(renderer, self._specials), renderer.shape
        # Two calls tell the token that ends an answer from one that ends each call.
        calls = [CALLED_TWICE if shape.writes_several_calls else CALLED] if shape.writes_calls else []
        for probe in (ANSWERED, *calls):
            try:
                text = "".join(text for text, trained in segmenter.cut_example(probe)[0] if trained)
            except DataError as err:
                if probe is not ANSWERED:  # it writes calls in longer conversations only
                    continue
                raise ModelError(f"the tokenizer's chat template can't be used: {err}") from None
            ends += [token for token in self._tokenize(text) if token in self._special_ids][-1:]
        eos = self._tokenizer.eos_token_id
        return tuple(dict.fromkeys([*ends, *([eos] if eos is not None else [])]))
