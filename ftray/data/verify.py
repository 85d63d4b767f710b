"""Verifies packed sequences on a sample before training, and traces the order in which ranks receive them.

The ids of a sequence are decoded and compared with the conversation as the template renders it in one piece, without
the optimizations of the data pipeline (segments, shapes, batches, packing, shifted labels). If ids or mask are wrong for this
tokenizer, template and data, the run ends here. The trace uses the coordinator and loaders of training, with ranks
that only record their batches.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import ray

from ftray.chat import ChatFormat, Conversation
from ftray.data.chunks import DatasetSpec
from ftray.data.examples import Example, read_examples
from ftray.data.index import Index
from ftray.data.loader import LoaderConfig, LoadPlan, RankLoader
from ftray.data.packing import IGNORE_INDEX, PackedSequence, pack_examples
from ftray.data.sources import line_number
from ftray.data.tokenizer import BatchTokenizer, backend_json
from ftray.errors import DataError

NUM_EXAMPLES = 64  # of each source


class _Mismatch(Exception):
    """A packed sequence does not match its record."""


def verify_sample(stream: DatasetSpec, index: Index, split: str, number: int = NUM_EXAMPLES) -> int:
    """Verifies the first `number` examples of each source.

    An example must be complete. Its trained tokens must decode to the text that the template renders for its answers after the
    generation prompt, up to and including the end token. This text must contain the answer.

    Returns:
        The number of examples.

    Raises:
        DataError: An example is wrong. The message names its record.
    """
    tokenizer = stream.load_tokenizer()
    chat, fast = ChatFormat(tokenizer), ChatFormat(tokenizer, BatchTokenizer(tokenizer, backend_json(tokenizer)))
    num_verified = 0
    for source in range(len(stream.sources)):
        left = number
        for facts in index.of_source(source):
            if not left:
                break
            items = read_examples(facts.chunk, fast, stream.rules(source))
            examples = list(islice((e for e in items if isinstance(e, Example)), left))
            _verify_examples(chat, examples, stream, facts.chunk.uri, split)
            left -= len(examples)
        num_verified += number - left
    return num_verified


def _verify_examples(chat: ChatFormat, examples: Sequence[Example], stream: DatasetSpec, uri: str, split: str) -> None:
    """Packs the examples of one shard and verifies the sequences. Raises DataError naming the record."""
    expected = [document for example in examples for document in by_document(example)]
    documents = [document for example in examples for document in example.encoded.documents()]
    verified: set[int] = set()
    for sequence in pack_examples(documents, stream.max_seq_len, 0, stream.packing):
        for place, ids, mask in read_back(sequence):
            verified.add(place)
            try:
                verify_example(chat, expected[place], ids, mask)
            except _Mismatch as err:
                line = line_number(uri, expected[place].position)
                where = f"line {line}" if line else f"record {expected[place].position}"
                raise DataError(
                    f"data.{split}: {uri}, {where}: {err}. This record cannot be trained on exactly with this tokenizer and "
                    "chat template; correct the record or the template, or use another base"
                ) from None
    if lost := len(expected) - len(verified):
        raise DataError(
            f"data.{split}: packing lost {lost} of {len(expected)} documents of {uri}; this is a bug in packing"
        )


def by_document(example: Example) -> list[Example]:
    """The expected content of each of the example's documents. Of several, each has the turns up to one trained answer."""
    if len(example.encoded.starts) == 1 or example.conversation is None:
        return [example]
    turns = example.conversation.messages
    context = [replace(turn, train=False) for turn in turns]
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.train]
    if len(answers) != len(example.encoded.starts):
        raise DataError(
            f"record {example.position} has {len(answers)} answers but {len(example.encoded.starts)} documents: a bug in "
            "ftray.chat"
        )
    return [
        replace(example, conversation=replace(example.conversation, messages=(*context[:i], turns[i]))) for i in answers
    ]


def read_back(sequence: PackedSequence) -> list[tuple[int, list[int], list[bool]]]:
    """The documents of a packed sequence, from the arrays that training receives (labels are one token ahead).

    Returns:
        (index, ids, loss mask) of each document.
    """
    documents, at = [], 0
    for place, length in zip(sequence.documents, sequence.lengths, strict=True):
        ids = [int(i) for i in sequence.input_ids[at : at + length]]
        labels = [int(i) for i in sequence.labels[at : at + length]]
        if labels[-1] != IGNORE_INDEX:
            raise DataError("the last token of a document predicts the next document: a bug in packing")
        mask = [False] + [label != IGNORE_INDEX for label in labels[:-1]]
        if any(trained and labels[i - 1] != ids[i] for i, trained in enumerate(mask)):
            raise DataError("the labels of a sequence are not its tokens: a bug in packing")
        documents.append((place, ids, mask))
        at += length
    return documents


def verify_example(chat: ChatFormat, example: Example, ids: Sequence[int], mask: Sequence[bool]) -> None:
    """Raises _Mismatch if ids or mask are not those of the example's conversation."""
    if example.conversation is None:
        text = chat.decode(ids)
        if example.text is not None:
            _compare(chat, "the sequence", text, chat.decode(chat.text_prefix) + example.text + chat.decode(ids[-1:]))
        if not all(mask[max(1, len(chat.text_prefix)) :]):
            raise _Mismatch("a token of a plain text is not trained on")
        return
    conversation = example.conversation
    messages = conversation.messages
    _compare(chat, "the sequence", chat.decode(ids), chat.render(conversation))
    expected = [
        (i, answer_text(chat, conversation, i)) for i, m in enumerate(messages) if m.role == "assistant" and m.train
    ]
    runs = _runs(ids, mask)
    if len(runs) != len(expected):
        raise _Mismatch(f"it has {len(expected)} answers to train on, but the mask selects {len(runs)} spans")
    for (start, end), (i, wanted) in zip(runs, expected, strict=True):
        trained = _known(chat, chat.decode(ids[start:end], before=ids[:start]), wanted)
        if ids[end - 1] not in chat.stop_token_ids:
            raise _Mismatch(f"the trained tokens of turn {i} do not end with an end token: {_end(trained)}")
        if chat.uses_marks:  # the template's own marks may select less
            if _writable(chat, trained) not in _writable(chat, wanted):
                raise _Mismatch(f"the trained tokens of turn {i} are not part of its answer: {_end(trained)}")
            continue
        _compare(chat, f"the trained part of turn {i}", trained, wanted, spaces=True)
        if _writable(chat, messages[i].content) not in _writable(chat, trained):
            raise _Mismatch(f"the template changes the answer of turn {i} to {_end(trained)}")


def answer_text(chat: ChatFormat, conversation: Conversation, i: int) -> str:
    """The text that the template renders for turn i after the generation prompt, up to and including its last end token."""
    head = chat.render(conversation.until(i), add_generation_prompt=True)
    turn = chat.render(conversation.until(i + 1)).removeprefix(head)
    ends = [
        turn.rfind(stop) + len(stop) for stop in (chat.decode([t]).strip() for t in chat.stop_token_ids) if stop in turn
    ]
    return turn[: max(ends)] if ends else turn


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
    raise _Mismatch(
        f"{part} is {decoded[max(0, at - 20) : at + 30]!r} but the template renders {wanted[max(0, at - 20) : at + 30]!r}"
    )


def _known(chat: ChatFormat, decoded: str, wanted: str) -> str:
    """A decoded text without the placeholders of characters that the vocabulary lacks."""
    if not chat.unknown_token or chat.unknown_token in wanted:
        return decoded
    return decoded.replace(chat.unknown_token, "")


def _writable(chat: ChatFormat, text: str, spaces: bool = False) -> str:
    """The part of a text that the tokenizer can write: composed characters that it has tokens for."""
    known = {c for c in set(text) if (c.isascii() and c.isprintable()) or chat.can_write(c)}
    kept = "".join(c for c in text if c in known and (spaces or not c.isspace()))
    return unicodedata.normalize("NFC", kept)


def _end(text: str) -> str:
    return repr(text if len(text) <= 60 else "…" + text[-60:])


def trace_order(plan: LoadPlan, world_size: int, start_step: int, first: int, end: int) -> Iterator[dict[str, Any]]:
    """Yields one entry per step of [first, end) and rank, in the order in which ranks receive their sequences.

    Needs a started Ray.

    Args:
        plan: The plan.
        world_size: The number of ranks.
        start_step: The step at which the loaders start, as after a checkpoint of that step.
        first: The first step that is reported.
        end: The step after the last one.

    Yields:
        step; rank; sequences: [source, epoch, chunk, sequence, sha256 of its input_ids and labels as little-endian int32];
        records: [path relative to the source, byte offset or number in the file] of every record in these sequences.
    """
    short = replace(plan, num_steps=min(end, plan.num_steps))
    shards = [named["train"] for named in LoaderConfig(short).configure(None, world_size)]
    ranks = [ray.remote(TracingRank).options(num_cpus=0).remote(shard, start_step) for shard in shards]
    try:
        for step in range(start_step, short.num_steps):
            for rank, entry in enumerate(ray.get([r.next.remote() for r in ranks])):
                if step >= first:
                    yield {"step": step, "rank": rank, **entry}
    finally:
        for handle in ranks:
            ray.kill(handle)


class TracingRank:
    """A rank that only records its sequences."""

    def __init__(self, shard: RankLoader, start_step: int) -> None:
        self._plan, self._tables = shard.plan, shard.tables(start_step)

    def next(self) -> dict[str, Any]:
        table = next(self._tables)
        ids, labels = (table.column(name).combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels"))
        length = self._plan.stream.max_seq_len
        sequences, records = [], []
        for place, sequence in enumerate(table.select(["source", "epoch", "chunk", "sequence", "records"]).to_pylist()):
            at = slice(place * length, (place + 1) * length)
            digest = hashlib.sha256(ids[at].tobytes() + labels[at].tobytes()).hexdigest()
            sequences.append([sequence["source"], sequence["epoch"], sequence["chunk"], sequence["sequence"], digest])
            path = self._plan.sources[sequence["source"]][sequence["chunk"]].chunk.path
            records += [[path, position] for position in sequence["records"]]
        return {"sequences": sequences, "records": records}


def as_line(entry: dict[str, Any]) -> str:
    """An entry as one line of JSON."""
    return json.dumps(entry, ensure_ascii=False)


def as_text(entry: dict[str, Any]) -> str:
    """An entry as one line of text for people."""
    sequences = ", ".join(f"{s}.{e}.{c}.{r} ({digest[:8]})" for s, e, c, r, digest in entry["sequences"])
    records = ", ".join(f"{path}@{position}" for path, position in entry["records"])
    return f"step {entry['step']} rank {entry['rank']}: sequences source.epoch.chunk.sequence {sequences}; records {records}"
