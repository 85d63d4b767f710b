"""Verifies records: their ids and masks are decoded and compared with their texts.

The texts are rendered for this record alone, without the optimizations of the data pipeline (shapes of conversations, batches).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ftray.chat import ChatFormat, ExpectedDocument, TrainOn
from ftray.data.examples import Example
from ftray.data.sources import Chunk, line_number
from ftray.errors import DataError

MAX_FRAMES = 10_000  # kept by a process


class Mismatch(Exception):
    """Ids or mask do not match their record."""


class PlainText(NamedTuple):
    """A text, and whether an end token follows it."""

    text: str
    has_end: bool


def expected_documents(chat: ChatFormat, example: Example) -> list[ExpectedDocument | PlainText]:
    """What the example's documents must decode to."""
    if example.conversation is None:
        return [PlainText(example.text or "", not example.is_cut)]
    return list(chat.expected(example.conversation))


def verify(chat: ChatFormat, expected: ExpectedDocument | PlainText, ids: Sequence[int], mask: Sequence[bool]) -> None:
    """Raises Mismatch if ids or mask are not the expected ones."""
    if isinstance(expected, PlainText):
        verify_text(chat, expected, ids, mask)
    else:
        verify_document(chat, expected, ids, mask)


def inexact(what: str, chunk: Chunk, position: int, error: Exception) -> DataError:
    """The error for a record whose ids or mask are wrong. what: the beginning of the message."""
    piece, local = chunk.locate(position)
    line = line_number(piece.uri, local)
    where = f"line {line}" if line else f"record {local}"
    return DataError(
        f"{what}{piece.uri}, {where}: {error}. This record cannot be trained on exactly with this tokenizer and chat template; "
        "correct the record or the template, or use another base"
    )


class RecordVerifier:
    """Verifies every record of a run, cheaply: decodes its ids once, and looks for its texts in them.

    What the template writes around the texts is compared with renderings of the first record that has it.

    Args:
        chat: A format without a fast way to ids.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._verified: set[tuple[str, str]] = set()  # around the texts: of whole documents, and of their trained parts

    def verify(self, examples: Sequence[Example], chunk: Chunk) -> None:
        """Verifies the examples of a chunk. Raises DataError naming a record whose ids or mask are wrong."""
        documents = [document for example in examples for document in example.encoded.documents()]
        texts = self._chat.decode_many([ids for ids, _ in documents])
        trained = self._chat.decode_many([np.asarray(ids)[np.asarray(mask)] for ids, mask in documents])
        at = 0
        for example in examples:
            number = len(example.encoded.starts)
            frame = self._frame(example, texts[at], trained[at], number)
            if frame not in self._verified:
                self._verify_exactly(example, chunk)
                if len(self._verified) >= MAX_FRAMES:
                    self._verified.clear()
                if frame is not None:
                    self._verified.add(frame)
            at += number

    def _frame(self, example: Example, text: str, trained: str, number: int) -> tuple[str, str] | None:
        """What the template writes around the texts of a document. None: they have to be compared with a rendering."""
        if number > 1 or (example.conversation is not None and not example.conversation.is_plain):
            return None
        if example.conversation is None:
            contents = learned = [self._chat.normalized(example.text or "")]
        else:
            messages, turns = example.conversation.messages, self._chat.trained_turns(example.conversation)
            contents = [self._chat.normalized(message.content.strip()) for message in messages]
            learned = [contents[i] for i in turns]
        frames = _around(text, contents), _around(trained, learned)
        return None if frames[0] is None or frames[1] is None else (frames[0], frames[1])

    def _verify_exactly(self, example: Example, chunk: Chunk) -> None:
        expected = expected_documents(self._chat, example)
        try:
            if len(expected) != len(example.encoded.starts):
                raise Mismatch(f"it has {len(example.encoded.starts)} documents instead of {len(expected)}")
            for document, (ids, mask) in zip(expected, example.encoded.documents(), strict=True):
                verify(self._chat, document, [int(i) for i in ids], [bool(m) for m in mask])
        except Mismatch as err:
            raise inexact("", chunk, example.position, err) from None


@lru_cache(maxsize=2)
def verifier_of(load: Callable[[], Any], train_on: TrainOn) -> RecordVerifier:
    """The verifier of this process for a tokenizer and the parts of answers that are trained on."""
    return RecordVerifier(ChatFormat(load(), train_on=train_on))


def _around(text: str, parts: Sequence[str]) -> str | None:
    """A text with a mark in place of each part, in their order. None if a part is missing."""
    frame, at = [], 0
    for part in parts:
        start = text.find(part, at)
        if start < 0:
            return None
        frame += [text[at:start], "\0"]
        at = start + len(part)
    return "".join([*frame, text[at:]])


def verify_text(chat: ChatFormat, expected: PlainText, ids: Sequence[int], mask: Sequence[bool]) -> None:
    """Raises Mismatch if ids or mask are not those of a plain text."""
    prefix = chat.decode(chat.text_prefix) if list(ids[: len(chat.text_prefix)]) == list(chat.text_prefix) else ""
    _compare(
        chat,
        "the sequence",
        chat.decode(ids),
        prefix + expected.text + (chat.decode(ids[-1:]) if expected.has_end else ""),
    )
    if not all(mask[max(1, len(chat.text_prefix)) :]):
        raise Mismatch("a token of a plain text is not trained on")


def verify_document(chat: ChatFormat, expected: ExpectedDocument, ids: Sequence[int], mask: Sequence[bool]) -> None:
    """Raises Mismatch if ids or mask are not those of a document of a conversation."""
    _compare(chat, "the sequence", chat.decode(ids), expected.text)
    for part in expected.trained:
        _check_is_one_answer(chat, part, expected.prompt)
    runs = _runs(ids, mask)
    if len(runs) != len(expected.trained):
        whole = "".join(chat.decode(ids[start:end], before=ids[:start]) for start, end in runs)
        if _writable(chat, whole) == _writable(chat, "".join(expected.trained)):
            return  # parts without a token between them
        raise Mismatch(f"it has {len(expected.trained)} parts to train on, but the mask selects {len(runs)} spans")
    for (start, end), wanted in zip(runs, expected.trained, strict=True):
        trained = _known(chat, chat.decode(ids[start:end], before=ids[:start]), wanted)
        _compare(chat, "a trained part", trained, wanted, spaces=True)
    if runs and ids[runs[-1][1] - 1] not in chat.stop_token_ids:
        raise Mismatch(f"the trained tokens do not end with an end token: {_end(chat.decode(ids[slice(*runs[-1])]))}")


def _check_is_one_answer(chat: ChatFormat, part: str, prompt: str) -> None:
    """Raises Mismatch if a trained part holds more than one answer, whatever the template was understood to write."""
    if prompt and prompt in part:
        raise Mismatch(f"a trained part contains the generation prompt {prompt.strip()!r}")
    body = part.rstrip()
    for stop in (chat.decode([token]) for token in chat.stop_token_ids):
        if stop in body.removesuffix(stop):
            raise Mismatch(f"a trained part goes on after the end token {stop}: {_end(body)}")


def _runs(ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[int, int]]:
    """[start, end) of each unbroken run of trained tokens."""
    edges = [i for i in range(len(ids) + 1) if (i < len(ids) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _compare(chat: ChatFormat, part: str, decoded: str, wanted: str, spaces: bool = False) -> None:
    """spaces: compare white space too. Some tokenizers add some beside special tokens, so whole sequences ignore it."""
    decoded = _known(chat, decoded, wanted)
    if decoded == wanted or _writable(chat, decoded, spaces) == _writable(chat, wanted, spaces):
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(decoded, wanted, strict=False)) if a != b), min(len(decoded), len(wanted))
    )
    raise Mismatch(
        f"{part} is {decoded[max(0, at - 20) : at + 30]!r} but the template renders {wanted[max(0, at - 20) : at + 30]!r}"
    )


def _known(chat: ChatFormat, decoded: str, wanted: str) -> str:
    """A decoded text without the placeholders of characters that the vocabulary lacks."""
    if not chat.unknown_token or chat.unknown_token in wanted:
        return decoded
    return decoded.replace(chat.unknown_token, "")


def _writable(chat: ChatFormat, text: str, spaces: bool = False) -> str:
    """The part of a text that the tokenizer can write: composed characters that it has tokens for."""
    text = chat.normalized(text)
    known = {c for c in set(text) if (c.isascii() and c.isprintable()) or chat.can_write(c)}
    kept = "".join(c for c in text if c in known and (spaces or not c.isspace()))
    return unicodedata.normalize("NFC", kept)


def _end(text: str) -> str:
    return repr(text if len(text) <= 60 else "…" + text[-60:])
