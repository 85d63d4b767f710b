"""The index's table of records: about 330 bytes per record, and 4 to 8 more per word.

The index pass makes it chunk by chunk and stores one Arrow file per shard with one batch per chunk, so a shard is read again
only if it or a setting changes. The files are memory-mapped, so checks over the whole set (duplicates, contamination, labels,
statistics) need the memory of a few columns only. Knows chunks and examples, but not Ray.
"""

from __future__ import annotations

import io
import json
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray.chat import Message
from ftray.chat.scripts import count_scripts
from ftray.data.checks.contamination import NgramHashes, eval_fingerprints, fingerprints
from ftray.data.checks.dedup import NUM_PERM, Signatures, record_keys, signature, spoken_text
from ftray.data.chunks import DatasetSpec, pack_chunk
from ftray.data.examples import Example, Quarantined
from ftray.data.sources import Chunk, Piece
from ftray.data.verify_records import verifier_of

MAX_KEYS = 20  # of a record
LABEL_CHARS = 60  # a longer answer is not a label
# bits of `flags`: quality rules, then the style of the answer
SHORT_ANSWER, REPEATED_LINES, UNPRINTABLE, CAPITAL, FINAL_MARK, MANY_LINES, JSON_LIKE = (1 << n for n in range(7))
QUALITY = {"short_answer": SHORT_ANSWER, "repeated_lines": REPEATED_LINES, "unprintable": UNPRINTABLE}
MIN_LINES, REPEATED_SHARE, UNPRINTABLE_SHARE = 6, 0.5, 0.1

SCHEMA = pa.schema(
    {
        "position": pa.int64(),
        "whole": pa.uint64(),
        "prompt": pa.uint64(),
        "answer": pa.uint64(),
        "num_tokens": pa.int32(),
        "num_trained_tokens": pa.int32(),
        "flags": pa.int32(),
        "digest": pa.uint64(),
        "stratum": pa.string(),
        "label": pa.string(),
        "signature": pa.binary(NUM_PERM * 2),
        "grams": pa.large_list(pa.uint64()),  # of an eval record: those that winnowing chooses
        "all_grams": pa.large_list(pa.uint64()),  # of an eval record only
    }
)


@dataclass(frozen=True)
class RequiredFields:
    """The fields that are worth computing.

    Attributes:
        signatures: For near-duplicates.
        grams: For contamination.
        is_eval: Eval records need other grams than training records.
        min_answer_chars: 0 for labels.
    """

    signatures: bool
    grams: bool
    is_eval: bool
    min_answer_chars: int


@dataclass(frozen=True)
class ChunkSummary:
    """The index's facts about a chunk, apart from its records."""

    num_records: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    digest: str
    bad: list[Quarantined]
    scripts: dict[str, int]
    most_documents: int  # in one sequence
    shortened: dict[str, int]  # by data.too_long: records, their examples, trained tokens that are lost
    keys: list[str]  # of records whose source names optional columns: these, and those of the first record


def describe_chunk(chunk: Chunk, stream: DatasetSpec, required: RequiredFields) -> bytes:
    """A chunk's summary and records, as bytes for `read_described`. Verifies every record.

    Raises:
        DataError: As `pack_chunk`, or the ids or the mask of a record are wrong.
    """
    packed = pack_chunk(chunk, stream)
    verifier_of(stream.load_tokenizer, stream.train_on).verify(packed.examples, chunk)
    scripts: Counter[str] = Counter()
    lines = [_describe(example, required, scripts) for example in packed.examples]
    summary = ChunkSummary(
        len({example.position for example in packed.examples}),
        len(packed.sequences),
        sum(r.num_tokens for r in packed.sequences),
        sum(r.num_trained_tokens for r in packed.sequences),
        packed.digest,
        packed.bad,
        dict(scripts),
        max((len(r.lengths) for r in packed.sequences), default=0),
        _shortened(packed.examples),
        _keys(packed.examples, stream.rules(chunk.source).optional),
    )
    sink = io.BytesIO()
    with open_writer(sink) as write:
        write(ChunkRecords(summary, pa.RecordBatch.from_pylist(lines, schema=SCHEMA)))
    return sink.getvalue()


def _shortened(examples: Sequence[Example]) -> dict[str, int]:
    """What `data.too_long` did to the records of a chunk."""
    num_parts = Counter(example.position for example in examples)
    short = [e for e in examples if num_parts[e.position] > 1 or e.is_cut or e.num_lost]
    records = len({example.position for example in short})
    return {"records": records, "examples": len(short), "lost": sum(e.num_lost for e in short)} if short else {}


def _keys(examples: Sequence[Example], optional: frozenset[str]) -> list[str]:
    """The optional columns that records have, and the first record's keys, which a message shows."""
    first = examples[0].keys[:MAX_KEYS] if examples and optional else ()
    return sorted({*first, *(key for example in examples for key in example.keys if key in optional)})


@dataclass(frozen=True)
class ChunkRecords:
    """The description of a chunk: its summary, and one row per record."""

    summary: ChunkSummary
    batch: pa.RecordBatch


@contextmanager
def open_writer(sink: Any) -> Iterator[Callable[[ChunkRecords], None]]:
    """A function that appends chunks to an Arrow file. sink: a path, or a file open for writing."""
    with pa.ipc.new_file(sink, SCHEMA) as writer:  # not compressed: hashes hardly shrink, and files are memory-mapped
        yield lambda chunk: writer.write_batch(chunk.batch, {"summary": json.dumps(asdict(chunk.summary))})


def read_described(data: bytes | mmap.mmap) -> list[ChunkRecords]:
    """The chunks in a file of `open_writer`. Their columns are views of `data`."""
    reader = pa.ipc.open_file(pa.py_buffer(data))
    described = []
    for i in range(reader.num_record_batches):
        entry = reader.get_batch_with_custom_metadata(i)
        tree = json.loads(entry.custom_metadata[b"summary"])
        summary = ChunkSummary(**{**tree, "bad": [Quarantined(**b) for b in tree["bad"]]})
        described.append(ChunkRecords(summary, entry.batch))
    return described


def _describe(example: Example, required: RequiredFields, scripts: Counter[str]) -> dict[str, Any]:
    turns = example.conversation.messages if example.conversation else (Message("assistant", example.text or ""),)
    keys = record_keys(turns, example.conversation.tools if example.conversation else ())
    answer = next((turn.text for turn in reversed(turns) if turn.role == "assistant"), "").strip()
    for turn in turns:
        count_scripts(turn.text, scripts)
    mask = example.encoded.loss_mask
    every, chosen = eval_fingerprints(turns) if required.grams and required.is_eval else ([], [])
    if required.grams and not required.is_eval:
        chosen = fingerprints(turns)
    return {
        "position": example.position,
        "whole": keys.whole,
        "prompt": keys.prompt,
        "answer": keys.answer,
        "num_tokens": len(example.encoded.input_ids),
        "num_trained_tokens": int(np.count_nonzero(mask[1:])),
        "flags": _flags(turns, answer, required.min_answer_chars),
        "digest": example.digest,
        "stratum": example.stratum,
        "label": answer if example.conversation and len(answer) <= LABEL_CHARS and "\n" not in answer else None,
        "signature": signature(spoken_text(turns)).tobytes() if required.signatures else None,
        "grams": chosen,
        "all_grams": every,
    }


def _flags(turns: Sequence[Message], answer: str, min_answer_chars: int) -> int:
    text = "\n".join(turn.text for turn in turns)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    odd = len(text) - len(re.sub(r"[^\n\t\r\x20-\x7e]", "", text))
    unprintable = sum(not (c.isprintable() or c.isspace()) or c == "\ufffd" for c in text) if odd else 0
    repeated = len(lines) - len(set(lines)) if len(lines) >= MIN_LINES else 0
    return (
        SHORT_ANSWER * (len(answer) < min_answer_chars)
        | REPEATED_LINES * (repeated > REPEATED_SHARE * len(lines))
        | UNPRINTABLE * (unprintable > UNPRINTABLE_SHARE * len(text))
        | CAPITAL * answer[:1].isupper()
        | FINAL_MARK * answer.endswith((".", "!", "?", "。", "！", "？"))
        | MANY_LINES * ("\n" in answer)
        | JSON_LIKE * (answer[:1] in "{[" and answer[-1:] in "}]" and len(answer) > 1)
    )


@dataclass(frozen=True)
class RecordTable:
    """All records of a training or eval set, in source and file order. A record's place is its number in this order.

    Attributes:
        chunks: The chunks.
        described: The description of each chunk.
    """

    chunks: tuple[Chunk, ...]
    described: tuple[ChunkRecords, ...]

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Place of each chunk's first record, and the number of records."""
        return np.cumsum([0, *(d.batch.num_rows for d in self.described)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def summaries(self) -> list[ChunkSummary]:
        """The summary of each chunk."""
        return [d.summary for d in self.described]

    def column(self, name: str) -> npt.NDArray[Any]:
        """A numeric column, as an array in memory."""
        parts = [d.batch.column(name).to_numpy() for d in self.described]
        kind = SCHEMA.field(name).type.to_pandas_dtype()
        return np.concatenate(parts) if parts else np.zeros(0, kind)

    def texts(self, name: str) -> pa.ChunkedArray:
        """A string column."""
        return pa.chunked_array([d.batch.column(name) for d in self.described], SCHEMA.field(name).type)

    def signatures(self) -> list[Signatures]:
        """uint16 [records, NUM_PERM] of each chunk that has records."""
        parts = [d.batch.column("signature") for d in self.described if d.batch.num_rows]
        return [
            np.frombuffer(part.buffers()[1], np.uint16).reshape(-1, NUM_PERM)[part.offset : part.offset + len(part)]
            for part in parts
        ]

    def grams(self, column: str = "grams") -> list[NgramHashes]:
        """A column of hash lists, for each chunk."""
        pieces = []
        for first, described in zip(self.offsets.tolist(), self.described, strict=False):
            part = described.batch.column(column)
            offsets = part.offsets.to_numpy()
            pieces.append(NgramHashes(part.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0], first))
        return pieces

    def chunk_numbers(self) -> npt.NDArray[np.int32]:
        """int32 [records]: the chunk of each record."""
        return np.repeat(np.arange(len(self.chunks), dtype=np.int32), np.diff(self.offsets))

    def where(self, place: int) -> tuple[Piece, int]:
        """The file of a record, and its identity in it."""
        chunk = self.chunk_of(place)
        return self.chunks[chunk].locate(self.position(chunk, place))

    def chunk_of(self, place: int) -> int:
        """Number of a record's chunk."""
        return int(np.searchsorted(self.offsets, place, "right")) - 1

    def position(self, chunk: int, place: int) -> int:
        """Position of a record in its chunk. chunk: the number of its chunk."""
        position: int = self.described[chunk].batch.column("position")[place - int(self.offsets[chunk])].as_py()
        return position
