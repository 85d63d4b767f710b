"""A proof on a sample, before any training: rows say what the records say, and the mask names the answers.

Rows are read back: ids are decoded and laid beside the conversation as the template writes it whole, without the
shortcuts by which ids are made (segments, shapes, batches, packing, shifted labels). So it holds for this tokenizer,
this template and this data, or the run ends here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from ftray.chat import ChatFormat, Message
from ftray.data.chunks import DatasetSpec
from ftray.data.examples import Example, read_examples
from ftray.data.index import Index
from ftray.data.packing import IGNORE_INDEX, PackedRow, pack_examples
from ftray.data.sources import line_number
from ftray.data.tokenizer import BatchTokenizer, backend_json
from ftray.errors import DataError

NUM_EXAMPLES = 64  # of each source


class _Mismatch(Exception):
    """What a row says isn't what its record says."""


def prove_sample(stream: DatasetSpec, index: Index, what: str, number: int = NUM_EXAMPLES) -> int:
    """Proves the first `number` examples of each source; returns how many there were. Raises DataError naming the record.

    Proven of each: nothing of it was cut; it has supervised tokens; these decode to what the template writes for its
    answers after the generation prompt, each up to and with its end token, and hold the answer's text.
    """
    tokenizer = stream.load_tokenizer()
    chat, fast = ChatFormat(tokenizer), ChatFormat(tokenizer, BatchTokenizer(tokenizer, backend_json(tokenizer)))
    proven = 0
    for source in range(len(stream.sources)):
        left = number
        for facts in index.of_source(source):
            if not left:
                break
            items = read_examples(facts.chunk, fast, stream.rules(source))
            examples = list(islice((e for e in items if isinstance(e, Example)), left))
            _prove_examples(chat, examples, stream, facts.chunk.uri, what)
            left -= len(examples)
        proven += number - left
    return proven


def _prove_examples(chat: ChatFormat, examples: Sequence[Example], stream: DatasetSpec, uri: str, what: str) -> None:
    """Packs examples of one shard and proves what is in the rows. Raises DataError naming the record."""
    said = [alone for example in examples for alone in by_document(example)]
    documents = [document for example in examples for document in example.encoded.documents()]
    seen: set[int] = set()
    for row in pack_examples(documents, stream.max_seq_len, 0, stream.packing):
        for place, ids, mask in read_back(row):
            seen.add(place)
            try:
                prove(chat, said[place], ids, mask)
            except _Mismatch as err:
                line = line_number(uri, said[place].position)
                where = f"line {line}" if line else f"record {said[place].position}"
                raise DataError(
                    f"data.{what}: {uri}, {where}: {err}. This record can't be trained on exactly with this tokenizer and "
                    "chat template; correct the record or the template, or use another base"
                ) from None
    if len(seen) != len(said):
        raise DataError(f"data.{what}: packing lost {len(said) - len(seen)} of {len(said)} documents of {uri}")


def by_document(example: Example) -> list[Example]:
    """What each of the example's documents must say: where there are several, the turns up to one of the learned answers."""
    if len(example.encoded.starts) == 1 or example.messages is None:
        return [example]
    turns = example.messages
    context = [replace(turn, train=False) for turn in turns]
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.train]
    if len(answers) != len(example.encoded.starts):
        raise DataError(
            f"record {example.position} has {len(answers)} answers and other documents: a bug in ftray.chat"
        )
    return [replace(example, messages=[*context[:i], turns[i]]) for i in answers]


def read_back(row: PackedRow) -> list[tuple[int, list[int], list[bool]]]:
    """(place, ids, loss mask) of each document in a row, from what training is given: labels are one token ahead."""
    found, at = [], 0
    for place, length in zip(row.documents, row.lengths, strict=True):
        ids = [int(i) for i in row.input_ids[at : at + length]]
        labels = [int(i) for i in row.labels[at : at + length]]
        if labels[-1] != IGNORE_INDEX:
            raise DataError("a row predicts the next document from the last token of one: a bug in packing")
        mask = [False] + [label != IGNORE_INDEX for label in labels[:-1]]
        if any(learned and labels[i - 1] != ids[i] for i, learned in enumerate(mask)):
            raise DataError("a row has labels that are not its tokens: a bug in packing")
        found.append((place, ids, mask))
        at += length
    return found


def prove(chat: ChatFormat, example: Example, ids: Sequence[int], mask: Sequence[bool]) -> None:
    """Raises _Differs when ids or mask are not those of the example's conversation."""
    if example.messages is None:
        text = chat.decode(ids)
        if example.text is not None:
            _compare(chat, "the row", text, example.text + chat.decode(ids[-1:]))
        if not all(mask[1:]):
            raise _Mismatch("a token of a plain text is not supervised")
        return
    messages = example.messages
    _compare(chat, "the row", chat.decode(ids), chat.render(messages))
    expected = [
        (i, answer_text(chat, messages, i)) for i, m in enumerate(messages) if m.role == "assistant" and m.train
    ]
    runs = _runs(ids, mask)
    if len(runs) != len(expected):
        raise _Mismatch(f"it has {len(expected)} answers to be learned, and the mask names {len(runs)} pieces")
    for (start, end), (i, wanted) in zip(runs, expected, strict=True):
        said = _known(chat, chat.decode(ids[start:end], before=ids[:start]), wanted)
        if ids[end - 1] not in chat.stop_token_ids:
            raise _Mismatch(f"what is learned of turn {i} does not end with an end token: {_end(said)}")
        if chat.uses_marks:  # the template's own marks may name less
            if _writable(chat, said) not in _writable(chat, wanted):
                raise _Mismatch(f"what is learned of turn {i} is not in its answer: {_end(said)}")
            continue
        _compare(chat, f"what is learned of turn {i}", said, wanted, spaces=True)
        if _writable(chat, messages[i].content) not in _writable(chat, said):
            raise _Mismatch(f"the template changes the answer of turn {i}: it writes {_end(said)}")


def answer_text(chat: ChatFormat, messages: Sequence[Message], i: int) -> str:
    """What the template writes for turn i after the generation prompt, up to and with its last end token."""
    head = chat.render(messages[:i], add_generation_prompt=True)
    turn = chat.render(messages[: i + 1]).removeprefix(head)
    ends = [
        turn.rfind(stop) + len(stop) for stop in (chat.decode([t]).strip() for t in chat.stop_token_ids) if stop in turn
    ]
    return turn[: max(ends)] if ends else turn


def _runs(ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[int, int]]:
    """[start, end) of each unbroken run of supervised tokens."""
    edges = [i for i in range(len(ids) + 1) if (i < len(ids) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _compare(chat: ChatFormat, what: str, found: str, wanted: str, spaces: bool = False) -> None:
    """spaces: white space counts too. Over a whole row it doesn't: some tokenizers add some beside special tokens."""
    found = _known(chat, found, wanted)
    if found == wanted or _writable(chat, found, spaces) == _writable(chat, wanted, spaces):
        return
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    raise _Mismatch(
        f"{what} says {found[max(0, at - 20) : at + 30]!r} where the template writes {wanted[max(0, at - 20) : at + 30]!r}"
    )


def _known(chat: ChatFormat, found: str, wanted: str) -> str:
    """A decoded text without the stand-ins for what the vocabulary lacks."""
    return found if not chat.unknown_token or chat.unknown_token in wanted else found.replace(chat.unknown_token, "")


def _writable(chat: ChatFormat, text: str, spaces: bool = False) -> str:
    """A text as far as the tokenizer can write it: composed characters, none that it has no token for."""
    known = {c for c in set(text) if (c.isascii() and c.isprintable()) or chat.can_write(c)}
    kept = "".join(c for c in text if c in known and (spaces or not c.isspace()))
    return unicodedata.normalize("NFC", kept)


def _end(text: str) -> str:
    return repr(text if len(text) <= 60 else "…" + text[-60:])
