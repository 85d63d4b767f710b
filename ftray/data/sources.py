"""Shards and chunks: the files of a source, how they are cut, and how a chunk's raw records are read.

Knows files and bytes, but not conversations, tokens or Ray. A record belongs to the chunk that contains its first byte, so
cutting a file needs no scan. A record's identity is its byte offset, or its number if the file is Parquet or cannot be split
by bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
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
FILE_BITS = 40
SMALL_SHARE, MAX_FILES = 16, 500  # a small file is less than this part of a chunk; at most so many are read by one task
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
class Piece:
    """A part of a file: bytes [start, end) of a .jsonl or .arrow file, row groups [start, end) of Parquet, or all of it."""

    uri: str
    path: str
    etag: str
    start: int
    end: int


@dataclass(frozen=True)
class Chunk:
    """The unit that is read, packed and shuffled as a whole: a piece of a file, or several small files.

    A position in the n-th file of a chunk is n · 2^FILE_BITS plus the record's identity in its file.

    Attributes:
        uri: The first file. path, etag, start and end belong to it.
        more: The other files, whole.
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
    more: tuple[Piece, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All of its parts of files, in the order in which they are read."""
        return (Piece(self.uri, self.path, self.etag, self.start, self.end), *self.more)

    @property
    def name(self) -> str:
        """Its file, for messages."""
        return f"{self.uri} (or one of {len(self.more)} small files packed with it)" if self.more else self.uri

    def locate(self, position: int) -> tuple[Piece, int]:
        """The file of a record, and the record's identity in it."""
        number, local = divmod(position, 1 << FILE_BITS)
        return self.pieces[number], local


@dataclass(frozen=True)
class RawRecord:
    """position: byte offset, or number in the file; see `Chunk` for several files. value: the bytes of a line, or an object."""

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


def cut_source(shards: Sequence[Shard], source: int, chunk_bytes: int) -> list[Chunk]:
    """The chunks of a source in file order, a pure function of the listing.

    The end of a chunk is the end of a packed sequence, so a file of a few records alone would leave most of its sequence empty.
    Small files are therefore grouped in the order of the listing, up to `chunk_bytes` and MAX_FILES.

    Args:
        shards: The files, from `list_shards`.
        source: The number of the source.
        chunk_bytes: The size of a chunk.

    Raises:
        DataError: As `cut_shard`.
    """
    chunks: list[Chunk] = []
    place, size = -1, 0  # of the group that is being filled
    for shard in shards:
        own = cut_shard(shard, source, chunk_bytes)
        if len(own) != 1 or shard.size_bytes * SMALL_SHARE >= chunk_bytes:
            chunks += own
        elif place < 0 or size + shard.size_bytes > chunk_bytes or len(chunks[place].more) + 1 == MAX_FILES:
            place, size = len(chunks), shard.size_bytes
            chunks += own
        else:
            size += shard.size_bytes
            chunks[place] = replace(chunks[place], more=(*chunks[place].more, *own[0].pieces))
    return chunks


def read_chunk(
    chunk: Chunk, needs: Callable[[str], bool] = is_any, required: Collection[str] = ()
) -> Iterator[RawRecord]:
    """The raw records of a chunk in file order.

    Args:
        chunk: The chunk.
        needs: Whether a column is read. Only Parquet and Arrow files make use of it.
        required: Columns that a Parquet or Arrow file must have.

    Raises:
        DataError: The shard changed since it was listed, or cannot be read.
    """
    yield from _read_piece(chunk.pieces[0], needs, required)
    for number, piece in enumerate(chunk.more, 1):
        for record in _read_piece(piece, needs, required):
            yield RawRecord((number << FILE_BITS) + record.position, record.value)


def _read_piece(piece: Piece, needs: Callable[[str], bool], required: Collection[str]) -> Iterator[RawRecord]:
    _, etag = storage.size_and_etag(piece.uri)
    if etag != piece.etag:
        raise DataError(
            f"{piece.uri} changed while the run was using it; restore it, or start a new run under another name"
        )
    if is_lines(piece.path):
        return _read_lines(piece)
    if kind_of(piece.path) == ".parquet":
        rows = ParquetShard(piece.uri).read(piece.start, piece.end, needs, required)
        return (RawRecord(number, row) for number, row in rows)
    if kind_of(piece.path) == ".arrow":
        rows = ArrowShard(piece.uri).read(piece.start, piece.end, needs, required)
        return (RawRecord(number, row) for number, row in rows)
    return _read_whole(piece)


def line_number(uri: str, position: int) -> int | None:
    """The line (from 1) at a byte offset of an uncompressed .jsonl file, None for other formats. Reads up to the offset."""
    if not is_lines(uri):
        return None
    pieces = pairwise([*range(0, position, PIECE), position])
    return 1 + sum(storage.read_range(uri, start, end).count(b"\n") for start, end in pieces)


def _read_lines(chunk: Piece) -> Iterator[RawRecord]:
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


def _read_whole(chunk: Piece) -> Iterator[RawRecord]:
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
