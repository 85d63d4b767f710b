"""Eval records one by one, for evaluation by loss and by questions."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import ray

from ftray import config
from ftray.chat import ChatFormat, Conversation, Message
from ftray.data.chunks import DatasetSpec, pack_chunk
from ftray.data.examples import Example, Quarantined, Rules, parse_record, read_examples, split_part
from ftray.data.formats import BadRecord
from ftray.data.index import ChunkFacts, Index
from ftray.data.order import chunk_order, key
from ftray.data.sources import Chunk, RawRecord, cut_shard, line_number, list_shards, read_chunk
from ftray.errors import DataError

AHEAD = 8  # chunks that are read at the same time
Document = tuple[Any, Any]  # ids int32, loss mask bool


@dataclass(frozen=True)
class EvalExample:
    """An eval record.

    Attributes:
        id: Its shard and position.
        documents: Token ids and loss mask of each document.
        conversation: None for plain text.
        slice: Its value in the column `evaluate.slices`.
    """

    id: str
    documents: list[Document]
    conversation: Conversation | None = None
    slice: str | None = None

    @property
    def is_question(self) -> bool:
        """Whether it ends with an answer that a model can be asked for."""
        turns = self.conversation.messages if self.conversation is not None else ()
        return len(turns) > 1 and turns[-1].role == "assistant" and bool(turns[-1].content.strip())


def read_samples(index: Index, stream: DatasetSpec, number: int | None = None) -> list[EvalExample]:
    """Reads all records, or the first `number`: chunk by chunk, and within a chunk by a fixed hash order. Needs a started Ray.

    Raises:
        DataError: A shard no longer gives the sequences that were indexed.
    """
    samples = _samples(index, stream, AHEAD)
    try:
        return list(islice(samples, number))
    finally:
        samples.close()


def _samples(index: Index, stream: DatasetSpec, ahead: int) -> Generator[EvalExample, None, None]:
    facts = [f for f in index.facts if f.num_records]
    order = chunk_order([(f.chunk.path, f.chunk.start) for f in facts], seed=0, epoch=0, source=0)
    read = ray.remote(_read_chunk)
    tasks = deque(read.remote(facts[place], stream) for place in order[:ahead])
    for place in [*order[ahead:], *[None] * len(tasks)]:
        yield from ray.get(tasks.popleft())
        if place is not None:
            tasks.append(read.remote(facts[place], stream))


def _read_chunk(facts: ChunkFacts, stream: DatasetSpec) -> list[EvalExample]:
    packed = pack_chunk(facts.chunk, stream)
    if packed.digest != facts.digest:  # size and etag are unchanged, the content is not
        raise DataError(
            f"{facts.chunk.name} no longer gives the sequences that were indexed: the file or the tokenizer changed while the "
            "run was using it; restore it, or start a new run under another name"
        )
    return _ordered(packed.examples, facts.chunk, stream.max_seq_len)


def _ordered(examples: Iterable[Example], chunk: Chunk, max_seq_len: int) -> list[EvalExample]:
    def place(example: Example) -> tuple[str, int]:
        piece, position = chunk.locate(example.position)
        return piece.path, position

    def documents(example: Example) -> list[Document]:
        return [
            (ids[at : at + max_seq_len], mask[at : at + max_seq_len])  # a text that is joined with others may be longer
            for ids, mask in example.encoded.documents()
            for at in range(0, len(ids), max_seq_len)
        ]

    ordered = sorted(examples, key=lambda e: (key(*place(e)), e.part))
    names = ["{}:{}".format(*place(e)) + (f"#{e.part}" if e.part else "") for e in ordered]
    return [EvalExample(name, documents(e), e.conversation, e.slice) for name, e in zip(names, ordered, strict=True)]


def read_set(path: str, what: str, chat: ChatFormat, max_seq_len: int) -> list[EvalExample]:
    """All records of a small set, in this process. Raises DataError for a bad record, with file, line and reason."""
    rules = Rules(max_seq_len, "auto", None, None, None)
    examples_of_set: list[EvalExample] = []
    for shard in list_shards(path):
        for chunk in cut_shard(shard, 0, max(shard.size_bytes, 1)):
            examples = list(read_examples(chunk, chat, rules))
            for bad in (e for e in examples if isinstance(e, Quarantined)):
                line = line_number(bad.uri, bad.position)
                place = f"line {line}" if line else f"record {bad.position}"
                raise DataError(f"{what}: {bad.uri}, {place}: {bad.detail}; {bad.fix}")
            examples_of_set += _ordered([e for e in examples if isinstance(e, Example)], chunk, max_seq_len)
    return examples_of_set


def pick_shots(index: Index, stream: DatasetSpec, number: int, questions: Sequence[EvalExample]) -> list[list[Message]]:
    """The first `number` training conversations of one question and one answer that are not in the eval set.

    Raises:
        DataError: There are too few.
    """
    questions_used = {
        sample.conversation.messages[-2].content
        for sample in questions
        if sample.conversation is not None and sample.is_question
    }
    shots: list[list[Message]] = []
    for sample in _samples(index, stream, 1):
        if len(shots) == number:
            return shots
        turns = [m for m in (sample.conversation.messages if sample.conversation else ()) if m.role != "system"]
        if [m.role for m in turns] == ["user", "assistant"] and turns[0].content not in questions_used:
            questions_used.add(turns[0].content)
            shots.append([turns[0], replace(turns[1], train=False)])
    if len(shots) < number:
        raise DataError(
            f"evaluate.few_shot ({number}): training has only {len(shots)} conversations of one question and one answer "
            "that are not in the eval set; lower it"
        )
    return shots


def check_eval_split(data: config.DataConfig) -> None:
    """Checks that every source gives an eval record. It reads until it finds one, without Ray.

    Unreadable records are left to the index pass, which reports them.

    Raises:
        DataError: A source gives none.
    """
    split = data.eval
    if isinstance(split, list):
        for source in split:
            if next(_raw_records(source.path, data.chunk_mb), None) is None:
                raise DataError(f"data.eval: {source.path} has no usable record; add records or remove the source")
        return
    if split is None or split.stratify is not None:  # a class may get a substitute
        return
    for source in data.train:
        number, is_in_eval = 0, False
        for raw in _raw_records(source.path, data.chunk_mb):
            number, is_in_eval = number + 1, _is_in_eval(raw, split)
            if is_in_eval:
                break
        if not is_in_eval and number:
            raise DataError(
                f"data.eval.fraction ({split.fraction}) selects no record of {source.path} for the eval set "
                f"({number} records in all); raise it, or give data.eval its own sources"
            )


def _is_in_eval(raw: RawRecord, split: config.SplitConfig) -> bool:
    try:
        return split_part(parse_record(raw), split.fraction, split.group) == "eval"
    except BadRecord:
        return False


def _raw_records(path: str, chunk_mb: float) -> Iterator[RawRecord]:
    for shard in list_shards(path):
        for chunk in cut_shard(shard, 0, int(chunk_mb * 1e6)):
            yield from read_chunk(chunk)
