"""The index pass: reads everything once, before any training worker starts, and knows what there is.

For each chunk: records, packed rows, tokens, a digest. From these follow the exact number of steps, the order of rows
(`plan`), the quarantine, and the identity of the data (`plan_hash`): two runs with one plan hash see the same rows.
Kept as JSON in the run's storage under a name that covers files, settings and tokenizer, so that it is made once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ftray import storage
from ftray.data.chunks import Stream, pack_chunk
from ftray.data.clean import Quarantined
from ftray.data.order import Mixture
from ftray.data.raydata import map_in_order
from ftray.data.sources import Chunk, cut_shard, line_number, list_shards
from ftray.errors import DataError

VERSION = 1  # raise it when a chunk's rows or facts change their meaning


@dataclass(frozen=True)
class ChunkFacts:
    """What the index knows of a chunk."""

    chunk: Chunk
    num_records: int
    num_rows: int
    num_tokens: int
    num_supervised: int
    digest: str


@dataclass(frozen=True)
class Index:
    """Facts of all chunks of a stream in source and file order, and its bad records."""

    facts: tuple[ChunkFacts, ...]
    bad: tuple[Quarantined, ...]

    def total(self, field: str) -> int:
        """Sum of a numeric field of ChunkFacts."""
        return sum(getattr(f, field) for f in self.facts)

    def of_source(self, source: int) -> list[ChunkFacts]:
        """Chunks of a source that give rows, in file order."""
        return [f for f in self.facts if f.chunk.source == source and f.num_rows]

    def mixture(self, stream: Stream) -> Mixture:
        """How the sources' rows are mixed."""
        rows = tuple(sum(f.num_rows for f in self.of_source(i)) for i in range(len(stream.sources)))
        weights = [s.weight for s in stream.sources]
        return Mixture(rows, None if weights[0] is None else tuple(w for w in weights if w is not None))

    @property
    def data_hash(self) -> str:
        """Identity of the rows, wherever the files lie: paths within their sources, places, and the rows' content."""
        parts = [(f.chunk.source, f.chunk.path, f.chunk.start, f.num_rows, f.digest) for f in self.facts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_index(
    stream: Stream,
    chunk_bytes: int,
    directory: str,
    tokenizer_hash: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Index of a stream: read from `directory` if it is there, else made by one Ray Data pass and kept there.

    Raises DataError: a source that is missing, empty or unreadable.
    """
    chunks = [
        c
        for i, s in enumerate(stream.sources)
        for shard in list_shards(s.path)
        for c in cut_shard(shard, i, chunk_bytes)
    ]
    uri = storage.join(directory, f"index-{_cache_key(stream, chunks, tokenizer_hash)}.json")
    if storage.exists(uri):
        return _from_json(json.loads(storage.read_bytes(uri)))
    facts: list[ChunkFacts] = []
    bad: list[Quarantined] = []
    for chunk, text in zip(chunks, map_in_order(partial(_index_chunk, stream), chunks), strict=True):
        found = json.loads(text)
        facts.append(ChunkFacts(chunk, **found["facts"]))
        bad += [Quarantined(**b) for b in found["bad"]]
        if on_progress:
            on_progress(len(facts), len(chunks))
    index = Index(tuple(facts), tuple(bad))
    storage.write_bytes(uri, json.dumps(asdict(index)).encode())
    return index


def check_index(index: Index, stream: Stream, what: str, max_bad_records: int, directory: str) -> None:
    """Writes the quarantine file and raises DataError when there are too many bad records, or no rows in a source.

    what: `train` or `eval`, for messages and the quarantine file's name.
    """
    if index.bad:
        uri = storage.join(directory, "quarantine", f"{what}.jsonl")
        storage.write_bytes(uri, "".join(json.dumps(asdict(b), ensure_ascii=False) + "\n" for b in index.bad).encode())
        if len(index.bad) > max_bad_records:
            first = index.bad[0]
            line = line_number(first.uri, first.position)
            place = f"line {line}" if line else f"record {first.position}"
            rules = ", ".join(f"{n} {rule}" for rule, n in Counter(b.rule for b in index.bad).most_common())
            raise DataError(
                f"data.{what}: {len(index.bad)} bad records ({rules}), allowed are {max_bad_records}; the first is "
                f"{first.uri}, {place}: {first.detail}. All are listed in {uri}; correct them, or raise data.max_bad_records"
            )
    for i, source in enumerate(stream.sources):
        if not index.of_source(i):
            if stream.part == "eval":
                raise DataError(
                    f"data.eval.fraction ({stream.eval_fraction}) holds out no record of {source.path} "
                    f"({index.total('num_records')} in all); raise it, or give data.eval sources of its own"
                )
            raise DataError(
                f"data.{what}: {source.path} has no usable record; put records into it or remove the source"
            )


def _index_chunk(stream: Stream, chunk: Chunk) -> str:
    packed = pack_chunk(chunk, stream)
    facts = {
        "num_records": len(packed.examples),
        "num_rows": len(packed.rows),
        "num_tokens": sum(r.num_tokens for r in packed.rows),
        "num_supervised": sum(r.num_supervised for r in packed.rows),
        "digest": packed.digest,
    }
    return json.dumps({"facts": facts, "bad": [asdict(b) for b in packed.bad]})


def _cache_key(stream: Stream, chunks: Iterable[Chunk], tokenizer_hash: str) -> str:
    settings = [VERSION, stream.max_seq_len, stream.packing, stream.eval_fraction, stream.part, tokenizer_hash]
    shapes = [(s.format, s.columns) for s in stream.sources]
    text = json.dumps([settings, shapes, [asdict(c) for c in chunks]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _from_json(tree: dict[str, Any]) -> Index:
    facts = tuple(ChunkFacts(**{**f, "chunk": Chunk(**f["chunk"])}) for f in tree["facts"])
    return Index(facts, tuple(Quarantined(**b) for b in tree["bad"]))
