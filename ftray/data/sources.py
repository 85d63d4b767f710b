"""Shards and chunks: the files of a source, how they are cut, and how a chunk's raw records are read.

Knows files and bytes, but not conversations, tokens or Ray. A record belongs to the chunk that contains its first byte, so
cutting a file needs no scan. A record's identity is its byte offset, or its number if the file is Parquet or cannot be split
by bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ftray import storage
from ftray.data import decompress, embedded, hub
from ftray.data.arrow_file import ArrowShard
from ftray.data.arrow_rows import is_any
from ftray.data.parquet import ParquetShard, StoredFile
from ftray.errors import DataError

READ_AHEAD = 1 << 16  # bytes fetched to find the end of a chunk's last record; doubled until it is found
PIECE = 1 << 24  # bytes read at once to count lines
READ_BYTES = 1 << 20  # per read of a file that is not cut
KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".arrow")
LINES = (".jsonl", ".ndjson")
UNPACKED = (".parquet", ".arrow")  # not read from .gz or .zst: their readers need random access
SAVED = frozenset(
    {"dataset_info.json", "state.json", "dataset_dict.json"}
)  # beside the data in a `save_to_disk` folder


@dataclass(frozen=True)
class Shard:
    """One file of a source. path: relative to the source, so copies elsewhere keep their order."""

    uri: str
    path: str
    size_bytes: int
    etag: str


@dataclass(frozen=True)
class Chunk:
    """A piece of a shard: bytes [start, end) of a .jsonl file, row groups [start, end) of Parquet, otherwise the whole file.

    Attributes:
        dropped: Positions of training records that `data.clean` removes.
        moved: Positions of records that are on the other side of the split than their hash says, so that their class has an
            eval record.
    """

    source: int
    uri: str
    path: str
    etag: str
    start: int
    end: int
    dropped: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()


@dataclass(frozen=True)
class RawRecord:
    """position: byte offset, or number in the file. value: the bytes of a line, or an object."""

    position: int
    value: bytes | dict[Any, Any]


def kind_of(path: str) -> str | None:
    """The suffix of a file's format, one of KINDS, without the compression's; None for other files."""
    name = path.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst")
    kind = next((kind for kind in KINDS if plain.endswith(kind)), None)
    return None if kind in UNPACKED and plain != name else kind


def is_lines(path: str) -> bool:
    """Whether a file is uncompressed JSON lines, which are cut at any byte."""
    return path.lower().endswith(LINES)


def list_shards(path: str, key: str = "data.train or data.eval") -> list[Shard]:
    """The files of a source, sorted by relative path.

    Args:
        path: A file, directory, glob, `embedded:…` or `hf:…`. In a directory, names with a leading `_` or `.` are ignored.
        key: What the user corrects if there is nothing.

    Raises:
        DataError: There is nothing, no file of a supported format, or only empty files.
    """
    path, files = _find(path, key)
    files = _without_saved_state(path, files)
    if not files:
        raise DataError(f"{path}: no such file or directory, or nothing in it; correct {key}")
    known = [f for f in files if kind_of(f.path) is not None]
    if not known:
        raise DataError(
            f"{path} contains {files[0].path}, but no {', '.join(KINDS)} file (all but parquet also .gz or .zst); convert the "
            "data to one of these"
        )
    shards = [Shard(f.uri, f.path, f.size_bytes, f.etag) for f in known if f.size_bytes > 0]
    if not shards:
        what = "the file is empty" if len(known) == 1 else f"all {len(known)} files are empty"
        raise DataError(f"{path}: {what}; add records, or correct the path")
    return shards


def other_files(path: str) -> list[str]:
    """Files of a source that `list_shards` skips because of their format or because they are empty, except names with a leading
    `_` or `.`.
    """
    path, files = _find(path, "the path")
    files = _without_saved_state(path, files)
    names = [f.path for f in files if kind_of(f.path) is None or f.size_bytes == 0]
    return [name for name in names if not _is_marked(name)]


def _without_saved_state(path: str, files: list[storage.FileInfo]) -> list[storage.FileInfo]:
    """The files without those that describe a folder of `save_to_disk` of the library `datasets`.

    Raises:
        DataError: The folder has several splits, so that eval data would become training data.
    """
    if any(file.path == "dataset_dict.json" for file in files):
        splits = sorted({file.path.split("/")[0] for file in files if file.path.endswith("/state.json")})
        raise DataError(f"{path} holds the splits {', '.join(splits)}; choose one, for example {path}/{splits[0]}")
    folders = {file.path.rpartition("/")[0] for file in files if kind_of(file.path) == ".arrow"}
    return [
        file
        for file in files
        if file.path.rpartition("/")[0] not in folders or file.path.rpartition("/")[2] not in SAVED
    ]


def _is_marked(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _find(path: str, key: str) -> tuple[str, list[storage.FileInfo]]:
    """The resolved path, and all files there."""
    if path.startswith("hf:"):
        path = hub.resolve(path)
    path = embedded.resolve(path) if path.startswith("embedded:") else storage.absolute(path)
    if any(c in path for c in "*?["):
        return path, storage.glob_files(path)
    if kind_of(path) is None:
        return path, [file for file in storage.list_files(path) if not _is_marked(file.path)]
    if not storage.exists(path):
        raise DataError(f"{path} does not exist; correct {key}")
    size, etag = storage.size_and_etag(path)
    return path, [storage.FileInfo(uri=path, path=path.rsplit("/", 1)[-1], size_bytes=size, etag=etag)]


def cut_shard(shard: Shard, source: int, chunk_bytes: int) -> list[Chunk]:
    """The chunks of a shard in file order. Raises DataError for a Parquet file without a readable footer."""
    if is_lines(shard.path):
        edges = [*range(0, shard.size_bytes, chunk_bytes), shard.size_bytes]
    elif kind_of(shard.path) == ".parquet":
        edges = ParquetShard(shard.uri).edges(chunk_bytes)
    elif kind_of(shard.path) == ".arrow":
        edges = ArrowShard(shard.uri).edges(chunk_bytes)
    else:
        edges = [0, shard.size_bytes]
    return [Chunk(source, shard.uri, shard.path, shard.etag, a, b) for a, b in pairwise(edges)]


def read_chunk(chunk: Chunk, needs: Callable[[str], bool] = is_any) -> Iterator[RawRecord]:
    """The raw records of a chunk in file order.

    Args:
        chunk: The chunk.
        needs: Whether a column is read. Only Parquet makes use of it.

    Raises:
        DataError: The shard changed since it was listed, or cannot be read.
    """
    _, etag = storage.size_and_etag(chunk.uri)
    if etag != chunk.etag:
        raise DataError(
            f"{chunk.uri} changed while the run was using it; restore it, or start a new run under another name"
        )
    if is_lines(chunk.path):
        return _read_lines(chunk)
    if kind_of(chunk.path) == ".parquet":
        rows = ParquetShard(chunk.uri).read(chunk.start, chunk.end, needs)
        return (RawRecord(number, row) for number, row in rows)
    if kind_of(chunk.path) == ".arrow":
        rows = ArrowShard(chunk.uri).read(chunk.start, chunk.end, needs)
        return (RawRecord(number, row) for number, row in rows)
    return _read_whole(chunk)


def line_number(uri: str, position: int) -> int | None:
    """The line (from 1) at a byte offset of an uncompressed .jsonl file, None for other formats. Reads up to the offset."""
    if not is_lines(uri):
        return None
    pieces = pairwise([*range(0, position, PIECE), position])
    return 1 + sum(storage.read_range(uri, start, end).count(b"\n") for start, end in pieces)


def _read_lines(chunk: Chunk) -> Iterator[RawRecord]:
    # From one byte before the chunk: if that is a newline, a record begins at the chunk's first byte.
    at = max(chunk.start - 1, 0)
    data = storage.read_range(chunk.uri, at, chunk.end)
    if chunk.start > 0:
        first = data.find(b"\n") + 1
        if not first or at + first >= chunk.end:
            return  # the chunk lies inside one record that began before it
        data, at = data[first:], at + first
    if not data.endswith(b"\n"):
        data += _rest_of_line(chunk.uri, chunk.end)
    if at == 0 and data.startswith(b"\xef\xbb\xbf"):
        data, at = data[3:], 3  # a byte order mark is not part of the first record
    for line in data.split(b"\n"):
        decompress.check_record(chunk.uri, len(line), f"byte {at}")
        if line.strip():
            yield RawRecord(at, line)
        at += len(line) + 1


def _rest_of_line(uri: str, start: int) -> bytes:
    """The bytes from an offset to the next newline or the end of the file. Raises DataError if that is too far away."""
    pieces, size, begin = [], READ_AHEAD, start
    while True:
        piece = storage.read_range(uri, start, start + size)
        newline = piece.find(b"\n") + 1
        pieces.append(piece[:newline] if newline else piece)
        if newline or len(piece) < size:
            return b"".join(pieces)
        start, size = start + size, size * 2
        decompress.check_record(uri, start - begin, f"byte {begin}")


def _read_whole(chunk: Chunk) -> Iterator[RawRecord]:
    """The records of a file that is not cut: compressed, a JSON array, or CSV. Position: the number of the line or item."""
    kind = kind_of(chunk.path)
    with io.BufferedReader(StoredFile(chunk.uri), READ_BYTES) as source:
        pieces = decompress.expanded(chunk.uri, source)
        if kind in LINES:
            for number, line in enumerate(decompress.lines(chunk.uri, pieces)):
                if line.strip():
                    yield RawRecord(number, line)
        elif kind == ".csv":
            for number, row in enumerate(decompress.csv_rows(chunk.uri, pieces)):
                yield RawRecord(number, row)
        else:
            for number, item in enumerate(decompress.json_records(chunk.uri, pieces)):
                value = item if isinstance(item, (dict, bytes)) else json.dumps(item).encode()
                if not isinstance(value, bytes) or value.strip():
                    yield RawRecord(number, value)
