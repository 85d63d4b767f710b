"""Verifies packed sequences on a sample before training, and traces the order in which ranks receive them.

The records of the sequences are verified (`verify_records`) from the arrays that training receives: packed, with shifted labels.
The trace uses the coordinator and loaders of training, with ranks that only record their batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import ray

from ftray.chat import ChatFormat
from ftray.data.chunks import DatasetSpec, pack_all
from ftray.data.examples import Example, read_examples
from ftray.data.index import Index
from ftray.data.loader import LoaderConfig, LoadPlan, RankLoader
from ftray.data.packing import IGNORE_INDEX, PackedSequence, pack_examples
from ftray.data.sources import Chunk
from ftray.data.tokenizer import BatchTokenizer, backend_json
from ftray.data.verify_records import Mismatch, expected_documents, inexact, verify
from ftray.errors import DataError

NUM_EXAMPLES = 64  # of each source


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
    chat = ChatFormat(tokenizer, train_on=stream.train_on)
    fast = ChatFormat(tokenizer, BatchTokenizer(tokenizer, backend_json(tokenizer)), stream.train_on)
    num_verified = 0
    for source in range(len(stream.sources)):
        left = number
        for facts in index.of_source(source):
            if not left:
                break
            items = read_examples(facts.chunk, fast, stream.rules(source))
            examples = list(islice((e for e in items if isinstance(e, Example)), left))
            _verify_examples(chat, examples, stream, facts.chunk, split)
            left -= len(examples)
        num_verified += number - left
    return num_verified


def _verify_examples(
    chat: ChatFormat, examples: Sequence[Example], stream: DatasetSpec, chunk: Chunk, split: str
) -> None:
    """Packs the examples of one chunk and verifies the sequences. Raises DataError naming the record."""
    if stream.joins_text:
        examples = _verify_joined(examples, stream, chunk, split)
    expected = [(example, document) for example in examples for document in expected_documents(chat, example)]
    documents = [document for example in examples for document in example.encoded.documents()]
    if len(documents) != len(expected):
        raise DataError(f"{len(documents)} documents instead of {len(expected)} in {chunk.uri}: a bug in ftray.chat")
    verified: set[int] = set()
    for sequence in pack_examples(documents, stream.max_seq_len, 0, stream.packing):
        for place, ids, mask in read_back(sequence):
            verified.add(place)
            try:
                verify(chat, expected[place][1], ids, mask)
            except Mismatch as err:
                raise inexact(f"data.{split}: ", chunk, expected[place][0].position, err) from None
    if lost := len(expected) - len(verified):
        raise DataError(
            f"data.{split}: packing lost {lost} of {len(expected)} documents of {chunk.uri}; this is a bug in packing"
        )


def _verify_joined(examples: Sequence[Example], stream: DatasetSpec, chunk: Chunk, split: str) -> list[Example]:
    """Verifies that the pieces of joined texts are the texts' ids, in order. Returns the other examples."""
    texts = [example for example in examples if example.conversation is None]
    sequences, owners = pack_all(texts, stream, 0)
    pieces = sorted((place, ids) for sequence in sequences for place, ids, _ in read_back(sequence))
    joined: dict[int, list[int]] = {}
    for place, ids in pieces:
        joined.setdefault(owners[place], []).extend(ids)
    if [joined.get(i) for i in range(len(texts))] != [[int(t) for t in text.encoded.input_ids] for text in texts]:
        raise DataError(f"data.{split}: joining the texts of {chunk.uri} changed them; this is a bug in packing")
    return [example for example in examples if example.conversation is not None]


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
            chunk = self._plan.sources[sequence["source"]][sequence["chunk"]].chunk
            places = [chunk.locate(position) for position in sequence["records"]]
            records += [[piece.path, position] for piece, position in places]
        return {"sequences": sequences, "records": records}


def as_line(entry: dict[str, Any]) -> str:
    """An entry as one line of JSON."""
    return json.dumps(entry, ensure_ascii=False)


def as_text(entry: dict[str, Any]) -> str:
    """An entry as one line of text for people."""
    sequences = ", ".join(f"{s}.{e}.{c}.{r} ({digest[:8]})" for s, e, c, r, digest in entry["sequences"])
    records = ", ".join(f"{path}@{position}" for path, position in entry["records"])
    return f"step {entry['step']} rank {entry['rank']}: sequences source.epoch.chunk.sequence {sequences}; records {records}"
