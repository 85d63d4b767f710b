"""The index pass: reads all data once, before any training worker starts.

For each chunk the index has the number of records, packed sequences and tokens, and a digest. They determine the exact number
of steps, the order of sequences, the quarantine, and the identity of the data: two runs with the same hash see the same
sequences.

One Ray Data pass describes every chunk (`record_table`). The descriptions are stored as one file per shard, named after the
shard's etag and chunks, the settings and the tokenizer, so only a new shard is read when one is added. Over all records
together `checks` finds records that repeat, overlap with the eval set or must change sides. Chunks with such records get their
positions in the descriptor and are counted again. The index itself is stored as JSON.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

from ftray import config, storage
from ftray.data.checks.findings import CheckResult, DataFinding, find_all, find_moved, with_changes
from ftray.data.chunks import DatasetSpec, streams
from ftray.data.examples import Quarantined
from ftray.data.formats import HARMLESS_KEYS, missing_columns
from ftray.data.order import Mixture
from ftray.data.ray_options import map_in_order
from ftray.data.record_table import (
    ChunkRecords,
    ChunkSummary,
    RecordTable,
    RequiredFields,
    describe_chunk,
    open_writer,
    read_described,
)
from ftray.data.sources import Chunk, cut_source, line_number, list_shards
from ftray.errors import DataError

VERSION = 10  # increase it when sequences, facts or records of a chunk change their meaning
SUM = "sha256"  # of the rest of an index: a damaged number would look like changed data
NUM_LINES = 50  # entries of a quarantine file that get a line number
NO_FIELDS = RequiredFields(signatures=False, grams=False, is_eval=False, min_answer_chars=0)
Progress = Callable[[int, int], None]
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # some readers take these for line ends


@dataclass(frozen=True)
class ChunkFacts:
    """The index's entry of a chunk. most_documents: the largest number in one sequence, or 0 if it was not counted yet."""

    chunk: Chunk
    num_records: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    digest: str
    most_documents: int = 0


@dataclass(frozen=True)
class Index:
    """The facts of all chunks of a training or eval set.

    Attributes:
        facts: In source and file order.
        bad: The bad records.
        dropped: The records that `data.clean` removed.
        found: For each rule, the number of records that it found in the whole set, and how many of them stay.
        findings: Name of the file that lists the findings, if there are any.
        shards: Names of the files with the record tables.
        shortened: What `data.too_long` did: numbers of `records`, of the `examples` that they became, of `lost` trained tokens.
        missing_columns: A sentence on each optional column that no record of its source has.
    """

    facts: tuple[ChunkFacts, ...]
    bad: tuple[Quarantined, ...]
    dropped: tuple[Quarantined, ...] = ()
    found: dict[str, tuple[int, int]] = field(default_factory=dict)
    findings: str | None = None
    shards: tuple[str, ...] = ()
    shortened: dict[str, int] = field(default_factory=dict)
    missing_columns: tuple[str, ...] = ()

    def total(self, field: str) -> int:
        """Sum of a numeric field of ChunkFacts."""
        return sum(getattr(f, field) for f in self.facts)

    @property
    def most_documents(self) -> int:
        """The largest number of documents in one sequence."""
        return max((f.most_documents for f in self.facts), default=0)

    def of_source(self, source: int) -> list[ChunkFacts]:
        """The chunks of a source that give sequences, in file order."""
        return [f for f in self.facts if f.chunk.source == source and f.num_sequences]

    def mixture(self, stream: DatasetSpec) -> Mixture:
        """How the sources' sequences are mixed."""
        sequences = tuple(sum(f.num_sequences for f in self.of_source(i)) for i in range(len(stream.sources)))
        weights = [s.weight for s in stream.sources]
        return Mixture(sequences, None if weights[0] is None else tuple(w for w in weights if w is not None))

    @property
    def data_hash(self) -> str:
        """Identity of the sequences, independent of the files' location.

        It covers paths within the sources, positions, the content of the sequences, and the records that were dropped or
        moved to the other side of the split.
        """
        parts = [
            ([p.path for p in c.pieces], c.source, c.start, f.num_sequences, f.digest, c.dropped, c.moved)
            for f, c in ((facts, facts.chunk) for facts in self.facts)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_index(
    stream: DatasetSpec, chunk_bytes: int, directory: str, tokenizer_hash: str, on_progress: Progress | None = None
) -> Index:
    """The index of a training or eval set: read from `directory`, or made by one Ray Data pass and stored there.

    The pass reads training and eval data together, because each affects the other.

    Raises:
        DataError: A source is missing, empty or unreadable.
    """
    splits = _splits_of(stream)
    chunk_lists = [_list_chunks(s, chunk_bytes) for s in splits]
    uri = storage.join(directory, f"index-{_index_key(stream, splits, chunk_lists, tokenizer_hash)}.json")
    if (known := _read(uri)) is not None:
        return known
    names, tables = _describe_all(splits, chunk_lists, directory, tokenizer_hash, on_progress)
    moved = _find_moved(stream, tables)
    if moved:
        chunk_lists = [with_changes(chunks, {}, moved) for chunks in chunk_lists]
        names, tables = _describe_all(splits, chunk_lists, directory, tokenizer_hash, on_progress)
    own = tables[splits.index(stream)]
    findings = None
    if stream.data is not None and not stream.is_eval:
        findings = find_all(own, tables[1] if len(tables) > 1 else None, stream.data.clean)
    sharing = tables if stream.part is not None else [own]  # both sides of a split have the same sources
    index = replace(
        _assemble(stream, own, findings, moved),
        shards=names[splits.index(stream)],
        missing_columns=_missing_columns(stream, sharing),
    )
    if findings is not None and len(findings):
        name = f"findings-{_index_key(stream, splits, chunk_lists, tokenizer_hash)}.jsonl"
        write_lines(storage.join(directory, name), findings)
        index = replace(index, findings=name)
    _write(uri, index)
    return index


def read_index(directory: str, data_hash: str) -> Index | None:
    """The index in a run's `data/` that has this hash, if there is one."""
    for file in storage.list_files(directory, suffix=".json"):
        if file.path.startswith("index-"):
            index = _read(file.uri)
            if index is not None and index.data_hash == data_hash:
                return index
    return None


def _read(uri: str) -> Index | None:
    """A stored index, or None if there is none or it cannot be read: then it is made again."""
    try:
        tree = storage.find_object(uri)
        if tree is None or tree.pop(SUM, None) not in (None, _checksum(tree)):
            return None
        return storage.parse_as(Index, tree)
    except (storage.DamagedFile, ValueError):
        return None


def _write(uri: str, index: Index) -> None:
    tree = asdict(index)
    storage.write_bytes(uri, json.dumps({**tree, SUM: _checksum(tree)}).encode())


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]


def read_record_table(index: Index, directory: str) -> RecordTable:
    """The record tables behind an index. They include the records that `data.clean` removed."""
    return _open_table([f.chunk for f in index.facts], index.shards, directory)


def _splits_of(stream: DatasetSpec) -> list[DatasetSpec]:
    """The training set and the eval set of the same section."""
    if stream.data is None:
        return [stream]
    return [s for s in streams(stream.data, stream.load_tokenizer, stream.slices) if s is not None]


def _list_chunks(stream: DatasetSpec, chunk_bytes: int) -> list[Chunk]:
    return [
        chunk
        for i, source in enumerate(stream.sources)
        for chunk in cut_source(list_shards(source.path), i, chunk_bytes)
    ]


def _describe_all(
    splits: Sequence[DatasetSpec],
    chunk_lists: Sequence[Sequence[Chunk]],
    directory: str,
    tokenizer_hash: str,
    on_progress: Progress | None,
) -> tuple[list[tuple[str, ...]], list[RecordTable]]:
    """The record tables of both sets, and the names of their files. Known shards are not read again."""
    shards: list[tuple[int, list[Chunk], str]] = []
    for number, chunks in enumerate(chunk_lists):
        for _, group in groupby(chunks, key=lambda c: (c.source, c.uri)):
            cut = list(group)
            key = _shard_key(splits[number], _required_fields(splits[number], len(splits)), cut, tokenizer_hash)
            shards.append((number, cut, f"{key}.arrow"))
    missing = [shard for shard in shards if not _is_sound(storage.join(directory, "shards", shard[2]))]
    items = [(number, chunk) for number, cut, _ in missing for chunk in cut]
    describe = partial(_describe, tuple(splits), tuple(_required_fields(s, len(splits)) for s in splits))
    done = 0
    with closing(map_in_order(describe, items)) as results:
        for _, cut, name in missing:
            with tempfile.NamedTemporaryFile(prefix="ftray-") as file:
                with open_writer(file.name) as write:
                    for _ in cut:
                        write(read_described(next(results))[0])
                        done += 1
                        if on_progress:
                            on_progress(done, len(items))
                storage.upload_file(file.name, storage.join(directory, "shards", name))
    names = [tuple(name for number, _, name in shards if number == i) for i in range(len(splits))]
    return names, [_open_table(chunk_lists[i], names[i], directory) for i in range(len(splits))]


def _open_table(chunks: Sequence[Chunk], names: Sequence[str], directory: str) -> RecordTable:
    """Raises DataError if a record table is missing or damaged."""
    files = [_open_shard(storage.join(directory, "shards", name)) for name in names]
    return RecordTable(tuple(chunks), tuple(described for file in files for described in file))


def _open_shard(uri: str) -> list[ChunkRecords]:
    try:
        return read_described(storage.map_file(uri))
    except storage.MissingFile:
        raise _damaged(uri, "it is missing") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        OSError,
    ) as err:  # pyarrow raises ValueErrors and OSErrors
        raise _damaged(uri, " ".join(str(err).split())[:100]) from None


def _is_sound(uri: str) -> bool:
    if not storage.exists(uri):
        return False
    try:
        _open_shard(uri)
    except DataError:
        return False
    return True


def _damaged(uri: str, reason: object) -> DataError:
    return DataError(
        f"{uri} is damaged ({reason}); delete the directory {uri.partition('/data/')[0]}/data and index the data again: "
        "ftray data index"
    )


def _describe(splits: tuple[DatasetSpec, ...], required: tuple[RequiredFields, ...], item: tuple[int, Chunk]) -> bytes:
    number, chunk = item
    return describe_chunk(chunk, splits[number], required[number])


def _required_fields(stream: DatasetSpec, num_streams: int) -> RequiredFields:
    if stream.data is None:
        return NO_FIELDS
    clean, compares = stream.data.clean, stream.data.clean.contamination != "off" and num_streams > 1
    near = clean.near_duplicates != "off" and not stream.is_eval
    return RequiredFields(
        near or compares, compares, stream.is_eval, 0 if stream.data.labels else clean.min_answer_chars
    )


def _find_moved(stream: DatasetSpec, tables: Sequence[RecordTable]) -> dict[int, tuple[int, ...]]:
    split = stream.data.eval if stream.data else None
    if not isinstance(split, config.SplitConfig) or split.stratify is None:
        return {}
    return find_moved(tables[0], tables[1], split.fraction)


def _assemble(
    stream: DatasetSpec,
    records: RecordTable,
    findings: CheckResult | None,
    moved: dict[int, tuple[int, ...]],
) -> Index:
    """Packs and counts chunks with dropped records again, so that the index agrees with training."""
    drops = findings.drops() if findings is not None else {}
    chunks = with_changes([replace(c, dropped=(), moved=()) for c in records.chunks], drops, moved)
    summaries = dict(enumerate(records.summaries))
    again = [i for i in range(len(chunks)) if chunks[i].dropped]
    describe = partial(_describe, (stream,), (NO_FIELDS,))
    with closing(map_in_order(describe, [(0, chunks[i]) for i in again])) as results:
        for i, data in zip(again, results, strict=True):
            summaries[i] = read_described(data)[0].summary
    facts = tuple(ChunkFacts(chunk, *_numbers(summaries[i])) for i, chunk in enumerate(chunks))
    reasons = {(f.uri, f.position): f for f in findings or () if f.dropped} if drops else {}
    bad, dropped = [], []
    for i in range(len(chunks)):
        for entry in summaries[i].bad:
            finding = reasons.get((entry.uri, entry.position)) if entry.rule == "dropped" else None
            if finding is None:
                bad.append(entry)
            else:
                dropped.append(replace(entry, rule=finding.rule, detail=finding.detail))
    counts = findings.counts() if findings is not None else {}
    shortened = sum((Counter(summary.shortened) for summary in summaries.values()), Counter[str]())
    return Index(facts, tuple(bad), tuple(dropped), counts, shortened=dict(shortened))


def _missing_columns(stream: DatasetSpec, tables: Sequence[RecordTable]) -> tuple[str, ...]:
    sentences: list[str] = []
    for number, source in enumerate(stream.sources):
        described = [
            summary for t in tables for c, summary in zip(t.chunks, t.summaries, strict=True) if c.source == number
        ]
        columns = stream.rules(number).columns
        if columns is not None and any(summary.num_records for summary in described):
            sentences += missing_columns(columns, {key for summary in described for key in summary.keys}, source.path)
    return tuple(sentences)


def _numbers(s: ChunkSummary) -> tuple[int, int, int, int, str, int]:
    return s.num_records, s.num_sequences, s.num_tokens, s.num_trained_tokens, s.digest, s.most_documents


def _settings(stream: DatasetSpec, tokenizer_hash: str) -> list[Any]:
    split = stream.data.eval if stream.data and isinstance(stream.data.eval, config.SplitConfig) else None
    labels = stream.data.labels if stream.data else None
    shape = [stream.max_seq_len, stream.packing, stream.eval_fraction, stream.part]
    shape += [stream.data.too_long, stream.data.pack_text] if stream.data else []
    columns = [split.stratify if split else None, split.group if split else None]
    return [VERSION, shape, *columns, labels, asdict(stream.train_on), tokenizer_hash]


def _shard_key(stream: DatasetSpec, required: RequiredFields, chunks: Sequence[Chunk], tokenizer_hash: str) -> str:
    """Name of a shard's file. It does not depend on the number of the source: a source may be inserted before it."""
    places = [{**asdict(chunk), "source": 0} for chunk in chunks]
    shape = _source_settings(stream, chunks[0].source)
    return _key_of([_settings(stream, tokenizer_hash), asdict(required), shape, places])


def _source_settings(stream: DatasetSpec, source: int) -> list[Any]:
    """The settings of a source that change its examples."""
    s = stream.sources[source]
    rules = stream.rules(source)
    allowed = [key for key in (stream.slices,) if key is not None and key not in HARMLESS_KEYS and s.columns is None]
    return [s.format, s.columns, sorted({*s.ignore, *allowed}), rules.tools]


def _index_key(
    stream: DatasetSpec, splits: Iterable[DatasetSpec], chunk_lists: Iterable[Sequence[Chunk]], tokenizer_hash: str
) -> str:
    shapes = [[_source_settings(each, i) for i in range(len(each.sources))] for each in splits]
    clean = stream.data.clean.model_dump() if stream.data else None
    chunks = [[asdict(chunk) for chunk in each] for each in chunk_lists]
    return _key_of([_settings(stream, tokenizer_hash), stream.is_eval, shapes, clean, chunks])


def _key_of(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_lines(uri: str, entries: Iterable[Quarantined | DataFinding]) -> None:
    """Writes one JSON object per line. The first NUM_LINES entries get a line number, which has to be counted in the shard."""
    with tempfile.NamedTemporaryFile("w", prefix="ftray-", encoding="utf-8") as file:
        for i, entry in enumerate(entries):
            tree = asdict(entry)
            if i < NUM_LINES:
                tree["line"] = line_number(entry.uri, entry.position)
            if isinstance(entry, DataFinding):
                tree["detail"] = entry.detail
            file.write(json.dumps(tree, ensure_ascii=False).translate(_LINE_ENDS) + "\n")
        file.flush()
        storage.upload_file(file.name, uri)
