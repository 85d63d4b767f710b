"""A look at some records of each source before a run: are they readable, and is the eval data like the training data?

Needs no Ray. The index pass checks every record later; this takes a second and finds most mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from ftray.chat import ChatFormat
from ftray.data.chunks import DatasetSpec
from ftray.data.examples import Example, Quarantined, read_examples
from ftray.data.formats import missing_columns
from ftray.data.order import key as hash_of
from ftray.data.sources import Chunk, Shard, cut_shard, line_number, list_shards
from ftray.errors import DataError

MAX_SHARDS = 4  # of each source: the first, and others by hash
RECORDS_PER_CHUNK = 100
CHUNK_BYTES = 1 << 20
MANY_DUPLICATES = 0.1  # share of sampled records from which duplicates are reported
OTHER_LENGTH = 3.0  # ratio of median lengths from which eval data is unlike training data
FEW_STEPS = 30


@dataclass(frozen=True)
class SourceSample:
    """What a sample of one source's records shows.

    Attributes:
        path: The source.
        num_files: Its files.
        size_bytes: Their size.
        lengths: Tokens of each good record.
        hashes: Of the content of each good record, its ids.
        missing_columns: A sentence on each column of a template that no sampled record has.
    """

    path: str
    num_files: int
    size_bytes: int
    lengths: tuple[int, ...]
    hashes: tuple[bytes, ...]
    missing_columns: tuple[str, ...] = ()

    @property
    def median_length(self) -> int:
        """Median of `lengths`."""
        return sorted(self.lengths)[len(self.lengths) // 2]


def sample_sources(stream: DatasetSpec, max_bad_records: int) -> list[SourceSample]:
    """Samples of each source of a data set.

    Args:
        stream: The data set. Both sides of a split are read.
        max_bad_records: data.max_bad_records.

    Raises:
        DataError: A source cannot be read, has more bad records than allowed, or none with a column that its columns name.
        ModelError: The tokenizer has no usable chat template.
    """
    whole = replace(stream, part=None)
    chat = ChatFormat(whole.load_tokenizer(), train_on=whole.train_on)
    return [_sample_source(whole, i, chat, max_bad_records) for i in range(len(whole.sources))]


def _sample_source(stream: DatasetSpec, source: int, chat: ChatFormat, max_bad_records: int) -> SourceSample:
    path = stream.sources[source].path
    shards = list_shards(path)
    others = sorted(shards[1:], key=lambda shard: hash_of("spot check", shard.path))
    good: list[Example] = []
    bad: list[tuple[Chunk, Quarantined]] = []
    for chunk, item in _items([shards[0], *others[: MAX_SHARDS - 1]], source, stream, chat):
        if isinstance(item, Quarantined):
            bad.append((chunk, item))
        else:
            good.append(item)
    if stream.data is not None and stream.data.too_long == "quarantine":  # these do not count in the index, either
        bad = [(chunk, item) for chunk, item in bad if item.rule != "too_long"]
    if len(bad) > max_bad_records:
        raise DataError(_explain(bad, len(good), max_bad_records))
    if not good:
        raise DataError(f"{path} has no usable record in its first files; correct data.train or data.eval")
    columns = stream.rules(source).columns
    is_whole = len(shards) == 1 and len(good) + len(bad) < RECORDS_PER_CHUNK
    keys = {key for example in good for key in example.keys}
    missing = missing_columns(columns or {}, keys, path, "record" if is_whole else "sampled record")
    if missing and is_whole:
        raise DataError(missing[0])
    return SourceSample(
        path,
        len(shards),
        sum(shard.size_bytes for shard in shards),
        tuple(len(example.encoded.input_ids) for example in good),
        tuple(hash_of(*map(int, example.encoded.input_ids)) for example in good),
        tuple(missing),
    )


def _items(
    shards: list[Shard], source: int, stream: DatasetSpec, chat: ChatFormat
) -> Iterator[tuple[Chunk, Example | Quarantined]]:
    """Records from the beginning, and from a piece chosen by hash, of each file."""
    for shard in shards:
        chunks = cut_shard(shard, source, CHUNK_BYTES)
        later = sorted(chunks[1:], key=lambda chunk: hash_of("spot check", chunk.path, chunk.start))
        for chunk in [chunks[0], *later[:1]]:
            for item in islice(read_examples(chunk, chat, stream.rules(source)), RECORDS_PER_CHUNK):
                yield chunk, item


def _explain(bad: list[tuple[Chunk, Quarantined]], num_good: int, max_bad_records: int) -> str:
    chunk, first = bad[0]
    line = line_number(chunk.uri, first.position)
    where = f"{chunk.uri}, {f'line {line}' if line else f'record {first.position}'}"
    of = f"{len(bad)} of {len(bad) + num_good} sampled records are bad" if len(bad) > 1 else "this record is bad"
    return f"{where}: {first.detail}; {first.fix}. {of}, and data.max_bad_records is {max_bad_records}"


def compare(train: list[SourceSample], evals: list[SourceSample], is_split: bool) -> list[str]:
    """Sentences on what looks wrong in the samples. is_split: The eval data is a part of the training sources."""
    warnings = [sentence for sample in (*train, *evals) for sentence in sample.missing_columns]
    for sample in train:
        num_duplicates = len(sample.hashes) - len(set(sample.hashes))
        if num_duplicates >= max(2, MANY_DUPLICATES * len(sample.hashes)):
            warnings.append(
                f"{sample.path}: {num_duplicates} of {len(sample.hashes)} sampled records are copies of others; set "
                "data.clean.duplicates to drop to train on one of each"
            )
    if is_split:
        return warnings
    known = {value for sample in train for value in sample.hashes}
    for sample in evals:
        if num_leaks := sum(value in known for value in sample.hashes):
            warnings.append(
                f"{sample.path}: {num_leaks} of {len(sample.hashes)} sampled eval records are in the training data, too; set "
                "data.clean.contamination to drop to keep them out of training"
            )
        middle = sorted(length for one in train for length in one.lengths)
        ratio = sample.median_length / middle[len(middle) // 2]
        if not 1 / OTHER_LENGTH < ratio < OTHER_LENGTH:
            warnings.append(
                f"{sample.path}: eval records have {sample.median_length} tokens in the middle, training records "
                f"{middle[len(middle) // 2]}; check that data.eval has the same kind of records as data.train"
            )
    return warnings
