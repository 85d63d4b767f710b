"""The index pass: reads everything once, before any training worker starts, and knows what there is.

For each chunk: records, packed sequences, tokens, a digest. From these follow the exact number of steps, the order of sequences
(`plan`), the quarantine, and the identity of the data (`plan_hash`): two runs with one plan hash see the same sequences.

One Ray Data pass describes every chunk (`records`); what it found is kept as one file a shard, under a name that covers
the shard's etag and cuts, settings and tokenizer, so that a new shard is the only one that is read when one is added.
Over all records together `findings` says what repeats, leaks or must change sides; chunks with such records carry their
positions in the descriptor and are counted again. The whole is kept as JSON beside.
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
from ftray.data.sources import Chunk, cut_shard, line_number, list_shards
from ftray.errors import DataError

VERSION = 6  # raise it when a chunk's sequences, facts or records change their meaning
SUM = "sha256"  # of all else in an index: a number that changed would look like data that changed
NUM_LINES = 50  # entries of a quarantine file whose line is counted
NOTHING = RequiredFields(signatures=False, grams=False, is_eval=False, min_answer_chars=0)
Progress = Callable[[int, int], None]
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # some readers end a line there


@dataclass(frozen=True)
class ChunkFacts:
    """What the index knows of a chunk. most_documents: in one sequence; 0 in indexes that did not count them yet."""

    chunk: Chunk
    num_records: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    digest: str
    most_documents: int = 0


@dataclass(frozen=True)
class Index:
    """Facts of all chunks of a stream in source and file order, its bad records, those that `data.clean` took out.

    found: records that each rule found over the whole set, and how many of these stay; findings: name of the file that
    lists them, where there are some. shards: names of the files with its record tables.
    """

    facts: tuple[ChunkFacts, ...]
    bad: tuple[Quarantined, ...]
    dropped: tuple[Quarantined, ...] = ()
    found: dict[str, tuple[int, int]] = field(default_factory=dict)
    findings: str | None = None
    shards: tuple[str, ...] = ()

    def total(self, field: str) -> int:
        """Sum of a numeric field of ChunkFacts."""
        return sum(getattr(f, field) for f in self.facts)

    @property
    def most_documents(self) -> int:
        """Documents of the sequence that holds the most."""
        return max((f.most_documents for f in self.facts), default=0)

    def of_source(self, source: int) -> list[ChunkFacts]:
        """Chunks of a source that give sequences, in file order."""
        return [f for f in self.facts if f.chunk.source == source and f.num_sequences]

    def mixture(self, stream: DatasetSpec) -> Mixture:
        """How the sources' sequences are mixed."""
        sequences = tuple(sum(f.num_sequences for f in self.of_source(i)) for i in range(len(stream.sources)))
        weights = [s.weight for s in stream.sources]
        return Mixture(sequences, None if weights[0] is None else tuple(w for w in weights if w is not None))

    @property
    def data_hash(self) -> str:
        """Identity of the sequences, wherever the files lie: paths within their sources, places, the sequences' content, and what
        was dropped or moved to the other side of the split."""
        parts = [
            (f.chunk.source, f.chunk.path, f.chunk.start, f.num_sequences, f.digest, f.chunk.dropped, f.chunk.moved)
            for f in self.facts
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_index(
    stream: DatasetSpec, chunk_bytes: int, directory: str, tokenizer_hash: str, on_progress: Progress | None = None
) -> Index:
    """Index of a stream: read from `directory` if it is there, else made by one Ray Data pass and kept there.

    The pass reads training and held-out data together, because each has a say in what the other holds. Raises DataError:
    a source that is missing, empty or unreadable.
    """
    both = _both(stream)
    listed = [_list_chunks(s, chunk_bytes) for s in both]
    uri = storage.join(directory, f"index-{_index_key(stream, both, listed, tokenizer_hash)}.json")
    if (known := _read(uri)) is not None:
        return known
    names, surveys = _survey(both, listed, directory, tokenizer_hash, on_progress)
    moved = _moved(stream, surveys)
    if moved:
        listed = [with_changes(chunks, {}, moved) for chunks in listed]
        names, surveys = _survey(both, listed, directory, tokenizer_hash, on_progress)
    own = surveys[both.index(stream)]
    found = None
    if stream.data is not None and not stream.is_eval:
        found = find_all(own, surveys[1] if len(surveys) > 1 else None, stream.data.clean)
    index = replace(_assemble(stream, own, found, moved), shards=names[both.index(stream)])
    if found is not None and len(found):
        name = f"findings-{_index_key(stream, both, listed, tokenizer_hash)}.jsonl"
        _write_lines(storage.join(directory, name), found)
        index = replace(index, findings=name)
    _write(uri, index)
    return index


def read_index(directory: str, data_hash: str) -> Index | None:
    """The index of those in a run's `data/` whose sequences are known by this hash."""
    for file in storage.list_files(directory, suffix=".json"):
        if file.path.startswith("index-"):
            index = _read(file.uri)
            if index is not None and index.data_hash == data_hash:
                return index
    return None


def _read(uri: str) -> Index | None:
    """An index that was kept; None where there is none that can be read: it can be made again."""
    try:
        tree = storage.find_object(uri)
        if tree is None or tree.pop(SUM, None) not in (None, _sum_of(tree)):
            return None
        return storage.parse_as(Index, tree)
    except (storage.DamagedFile, ValueError):
        return None


def _write(uri: str, index: Index) -> None:
    tree = asdict(index)
    storage.write_bytes(uri, json.dumps({**tree, SUM: _sum_of(tree)}).encode())


def _sum_of(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]


def read_record_table(index: Index, directory: str) -> RecordTable:
    """The record tables behind an index; what `data.clean` took out is in them."""
    return _open_survey([f.chunk for f in index.facts], index.shards, directory)


def _both(stream: DatasetSpec) -> list[DatasetSpec]:
    """Training stream and held-out stream of the section that a stream comes from."""
    if stream.data is None:
        return [stream]
    return [s for s in streams(stream.data, stream.load_tokenizer) if s is not None]


def _list_chunks(stream: DatasetSpec, chunk_bytes: int) -> list[Chunk]:
    return [
        chunk
        for i, source in enumerate(stream.sources)
        for shard in list_shards(source.path)
        for chunk in cut_shard(shard, i, chunk_bytes)
    ]


def _survey(
    both: Sequence[DatasetSpec],
    listed: Sequence[Sequence[Chunk]],
    directory: str,
    tokenizer_hash: str,
    on_progress: Progress | None,
) -> tuple[list[tuple[str, ...]], list[RecordTable]]:
    """What the pass finds in each stream, and in which files it is kept; shards that are known already are not read."""
    shards: list[tuple[int, list[Chunk], str]] = []
    for number, chunks in enumerate(listed):
        for _, group in groupby(chunks, key=lambda c: (c.source, c.uri)):
            cut = list(group)
            key = _shard_key(both[number], _wants(both[number], len(both)), cut, tokenizer_hash)
            shards.append((number, cut, f"{key}.arrow"))
    missing = [shard for shard in shards if not _is_sound(storage.join(directory, "shards", shard[2]))]
    items = [(number, chunk) for number, cut, _ in missing for chunk in cut]
    describe = partial(_describe, tuple(both), tuple(_wants(s, len(both)) for s in both))
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
    names = [tuple(name for number, _, name in shards if number == i) for i in range(len(both))]
    return names, [_open_survey(listed[i], names[i], directory) for i in range(len(both))]


def _open_survey(chunks: Sequence[Chunk], names: Sequence[str], directory: str) -> RecordTable:
    """Raises DataError for a record table that is missing or damaged."""
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
    ) as err:  # pyarrow's errors are ValueErrors or OSErrors
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
        f"{uri} is damaged ({reason}); delete the directory {uri.partition('/data/')[0]}/data and index the data anew: "
        "ftray data index"
    )


def _describe(both: tuple[DatasetSpec, ...], wants: tuple[RequiredFields, ...], item: tuple[int, Chunk]) -> bytes:
    number, chunk = item
    return describe_chunk(chunk, both[number], wants[number])


def _wants(stream: DatasetSpec, num_streams: int) -> RequiredFields:
    if stream.data is None:
        return NOTHING
    clean, compares = stream.data.clean, stream.data.clean.contamination != "off" and num_streams > 1
    near = clean.near_duplicates != "off" and not stream.is_eval
    return RequiredFields(
        near or compares, compares, stream.is_eval, 0 if stream.data.labels else clean.min_answer_chars
    )


def _moved(stream: DatasetSpec, surveys: Sequence[RecordTable]) -> dict[int, tuple[int, ...]]:
    split = stream.data.eval if stream.data else None
    if not isinstance(split, config.SplitConfig) or split.stratify is None:
        return {}
    return find_moved(surveys[0], surveys[1], split.fraction)


def _assemble(
    stream: DatasetSpec,
    survey: RecordTable,
    found: CheckResult | None,
    moved: dict[int, tuple[int, ...]],
) -> Index:
    """Chunks with dropped records are packed and counted again, so that the index says what training will see."""
    drops = found.drops() if found is not None else {}
    chunks = with_changes([replace(c, dropped=(), moved=()) for c in survey.chunks], drops, moved)
    summaries = dict(enumerate(survey.summaries))
    again = [i for i in range(len(chunks)) if chunks[i].dropped]
    describe = partial(_describe, (stream,), (NOTHING,))
    with closing(map_in_order(describe, [(0, chunks[i]) for i in again])) as results:
        for i, data in zip(again, results, strict=True):
            summaries[i] = read_described(data)[0].summary
    facts = tuple(ChunkFacts(chunk, *_numbers(summaries[i])) for i, chunk in enumerate(chunks))
    told = {(f.uri, f.position): f for f in found or () if f.dropped} if drops else {}
    bad, dropped = [], []
    for i in range(len(chunks)):
        for entry in summaries[i].bad:
            finding = told.get((entry.uri, entry.position)) if entry.rule == "dropped" else None
            if finding is None:
                bad.append(entry)
            else:
                dropped.append(replace(entry, rule=finding.rule, detail=finding.detail))
    return Index(facts, tuple(bad), tuple(dropped), found.counts() if found is not None else {})


def _numbers(s: ChunkSummary) -> tuple[int, int, int, int, str, int]:
    return s.num_records, s.num_sequences, s.num_tokens, s.num_trained_tokens, s.digest, s.most_documents


def _settings(stream: DatasetSpec, tokenizer_hash: str) -> list[Any]:
    split = stream.data.eval if stream.data and isinstance(stream.data.eval, config.SplitConfig) else None
    labels = stream.data.labels if stream.data else None
    shape = [stream.max_seq_len, stream.packing, stream.eval_fraction, stream.part]
    return [VERSION, shape, split.stratify if split else None, split.group if split else None, labels, tokenizer_hash]


def _shard_key(stream: DatasetSpec, wants: RequiredFields, chunks: Sequence[Chunk], tokenizer_hash: str) -> str:
    """Name of a shard's file. Which source it belongs to is not in it: one may be put in front of it."""
    source = stream.sources[chunks[0].source]
    places = [{**asdict(chunk), "source": 0} for chunk in chunks]
    return _hash([_settings(stream, tokenizer_hash), asdict(wants), source.format, source.columns, places])


def _index_key(
    stream: DatasetSpec, both: Iterable[DatasetSpec], listed: Iterable[Sequence[Chunk]], tokenizer_hash: str
) -> str:
    shapes = [[(s.format, s.columns) for s in each.sources] for each in both]
    clean = stream.data.clean.model_dump() if stream.data else None
    chunks = [[asdict(chunk) for chunk in each] for each in listed]
    return _hash([_settings(stream, tokenizer_hash), stream.is_eval, shapes, clean, chunks])


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_index(index: Index, stream: DatasetSpec, what: str, max_bad_records: int, directory: str) -> None:
    """Writes the quarantine file; raises DataError for too many bad records, or no sequences in a source.

    what: `train` or `eval`, for messages and the quarantine file's name. What `data.clean` took out is in the quarantine
    file too, but isn't counted: it was asked for.
    """
    uri = storage.join(directory, "quarantine", f"{what}.jsonl")
    if index.bad or index.dropped:
        _write_lines(uri, [*index.bad, *index.dropped])
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
        if index.of_source(i):
            continue
        if stream.part == "eval":
            raise DataError(
                f"data.eval.fraction ({stream.eval_fraction}) holds out no record of {source.path} "
                f"({index.total('num_records')} in all); raise it, or give data.eval sources of its own"
            )
        if index.dropped:
            raise DataError(
                f"data.{what}: data.clean leaves no record of {source.path} (see {uri}); set its rules to report"
            )
        raise DataError(f"data.{what}: {source.path} has no usable record; put records into it or remove the source")


def _write_lines(uri: str, entries: Iterable[Quarantined | DataFinding]) -> None:
    """One JSON object a line; of the first NUM_LINES also the line number, which has to be counted in the shard."""
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
