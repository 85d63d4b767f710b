"""What the index keeps of each record: a line of a table, about 330 bytes and 4 to 8 more for each word.

Made by the one pass over the data, chunk by chunk; kept as one Arrow file a shard, so that a shard is read again only
when it, or a setting, changes. All that is said of the whole set (duplicates, overlap, labels, statistics) is worked
out from these tables. Knows chunks and examples; nothing of Ray.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray.chat import Message
from ftray.data.chunks import Stream, pack_chunk
from ftray.data.clean import Example, Quarantined
from ftray.data.duplicates import NUM_PERM, Signatures, record_keys, signature, spoken_text
from ftray.data.overlap import Keys, fingerprints, heldout_fingerprints
from ftray.data.sources import Chunk

LABEL_CHARS = 60  # a longer answer is no label
# bits of `flags`: quality rules, then how the answer is written
SHORT_ANSWER, REPEATED_LINES, UNPRINTABLE, CAPITAL, FINAL_MARK, MANY_LINES, JSON_LIKE = (1 << n for n in range(7))
QUALITY = {"short_answer": SHORT_ANSWER, "repeated_lines": REPEATED_LINES, "unprintable": UNPRINTABLE}
NO_LETTERS = bytes(n for n in range(256) if not (n < 128 and chr(n).isalpha()))
MIN_LINES, REPEATED_SHARE, UNPRINTABLE_SHARE = 6, 0.5, 0.1

SCHEMA = pa.schema(
    {
        "chunk": pa.int32(),  # place among the stream's (in a file: the shard's) chunks
        "position": pa.int64(),
        "whole": pa.uint64(),
        "prompt": pa.uint64(),
        "answer": pa.uint64(),
        "num_tokens": pa.int32(),
        "num_supervised": pa.int32(),
        "flags": pa.int32(),
        "digest": pa.uint64(),
        "stratum": pa.string(),
        "label": pa.string(),
        "signature": pa.binary(NUM_PERM * 2),
        "grams": pa.large_list(pa.uint64()),  # of a held-out record: those that winnowing chooses
        "all_grams": pa.large_list(pa.uint64()),  # of a held-out record only
    }
)


@dataclass(frozen=True)
class Wants:
    """What is worth computing: signatures for near-duplicates, grams for overlap (other ones of held-out records).
    min_answer_chars: 0 with labels."""

    signatures: bool
    grams: bool
    is_heldout: bool
    min_answer_chars: int


@dataclass(frozen=True)
class ChunkSummary:
    """What the index knows of a chunk besides its records."""

    num_records: int
    num_rows: int
    num_tokens: int
    num_supervised: int
    digest: str
    bad: list[Quarantined]
    scripts: dict[str, int]


def describe_chunk(chunk: Chunk, stream: Stream, wants: Wants) -> bytes:
    """A chunk's summary and record table, as bytes for `read_described`. Raises DataError as `pack_chunk` does."""
    packed = pack_chunk(chunk, stream)
    scripts: Counter[str] = Counter()
    lines = [_describe(example, wants, scripts) for example in packed.examples]
    table = pa.Table.from_pylist(lines, schema=SCHEMA)
    summary = ChunkSummary(
        len(packed.examples),
        len(packed.rows),
        sum(r.num_tokens for r in packed.rows),
        sum(r.num_supervised for r in packed.rows),
        packed.digest,
        packed.bad,
        dict(scripts),
    )
    return write_described([summary], table)


def write_described(summaries: Sequence[ChunkSummary], table: pa.Table) -> bytes:
    """Summaries of some chunks and their records, as one Arrow file."""
    sink = io.BytesIO()
    text = json.dumps([asdict(summary) for summary in summaries])
    with pa.ipc.new_file(sink, SCHEMA.with_metadata({"summaries": text}), options=_OPTIONS) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read_described(data: bytes) -> tuple[list[ChunkSummary], pa.Table]:
    """What `write_described` wrote."""
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    trees = json.loads(table.schema.metadata[b"summaries"])
    found = [ChunkSummary(**{**tree, "bad": [Quarantined(**b) for b in tree["bad"]]}) for tree in trees]
    return found, table.replace_schema_metadata(None)


_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


def _describe(example: Example, wants: Wants, scripts: Counter[str]) -> dict[str, Any]:
    turns = example.messages or [Message("assistant", example.text or "")]
    keys = record_keys(turns)
    answer = next((turn.content for turn in reversed(turns) if turn.role == "assistant"), "").strip()
    for turn in turns:
        count_scripts(turn.content, scripts)
    mask = example.encoded.loss_mask
    every, chosen = heldout_fingerprints(turns) if wants.grams and wants.is_heldout else ([], [])
    if wants.grams and not wants.is_heldout:
        chosen = fingerprints(turns)
    return {
        "chunk": 0,
        "position": example.position,
        "whole": keys.whole,
        "prompt": keys.prompt,
        "answer": keys.answer,
        "num_tokens": len(example.encoded.input_ids),
        "num_supervised": int(np.count_nonzero(mask[1:])),
        "flags": _flags(turns, answer, wants.min_answer_chars),
        "digest": example.digest,
        "stratum": example.stratum,
        "label": answer if example.messages and len(answer) <= LABEL_CHARS and "\n" not in answer else None,
        "signature": signature(spoken_text(turns)).tobytes() if wants.signatures else None,
        "grams": chosen,
        "all_grams": every,
    }


def _flags(turns: Sequence[Message], answer: str, min_answer_chars: int) -> int:
    text = "\n".join(turn.content for turn in turns)
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


def count_scripts(text: str, into: Counter[str]) -> None:
    """Counts letters by Unicode script (the first word of their name: LATIN, CYRILLIC, CJK, …)."""
    plain = len(text.encode("ascii", "ignore").translate(None, delete=NO_LETTERS))
    if plain:
        into["LATIN"] += plain
    if not text.isascii():
        for letter, number in Counter(c for c in text if c > "\x7f" and c.isalpha()).items():
            into[_script(letter)] += number


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0]


@dataclass(frozen=True)
class Survey:
    """All that the pass found in a stream: its chunks in source and file order, their summaries, a line a record."""

    chunks: tuple[Chunk, ...]
    summaries: tuple[ChunkSummary, ...]
    table: pa.Table

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers."""
        values: npt.NDArray[Any] = self.table.column(name).to_numpy()
        return values

    @property
    def signatures(self) -> Signatures:
        """uint16 [records, NUM_PERM]."""
        parts = [
            np.frombuffer(part.buffers()[1], np.uint16).reshape(-1, NUM_PERM)[part.offset : part.offset + len(part)]
            for part in self.table.column("signature").chunks
            if len(part)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, NUM_PERM), np.uint16)

    def grams(self, column: str = "grams") -> list[tuple[Keys, npt.NDArray[np.int64], int]]:
        """Pieces of a column of lists: hashes one after the other, where each record's begin, the first record's place."""
        pieces, first = [], 0
        for part in self.table.column(column).chunks:
            offsets = part.offsets.to_numpy()
            pieces.append((part.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0], first))
            first += len(part)
        return pieces

    def where(self, place: int) -> tuple[Chunk, int]:
        """Chunk and position of a record."""
        return self.chunks[self.table.column("chunk")[place].as_py()], self.table.column("position")[place].as_py()


def join_surveys(chunks: Sequence[Chunk], described: Sequence[tuple[list[ChunkSummary], pa.Table]]) -> Survey:
    """One survey of consecutive pieces; the tables' chunk numbers are counted on."""
    summaries: list[ChunkSummary] = []
    tables = []
    for found, table in described:
        numbers = pa.array(table.column("chunk").to_numpy() + np.int32(len(summaries)), pa.int32())
        tables.append(table.set_column(0, SCHEMA.field("chunk"), numbers))
        summaries += found
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    return Survey(tuple(chunks), tuple(summaries), table)
