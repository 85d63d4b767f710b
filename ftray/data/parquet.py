"""Reads untrusted Parquet files by row group, within limits that make a hostile file harmless.

A Parquet file can name Arrow extension types, and a type that is registered in this process may run code when its
values are read (`ray.data.arrow_pickled_object` unpickles them). Only types on a short list are therefore read. A small file
can also contain billions of values, or pages that expand a thousandfold, so both are limited before anything is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ftray import storage
from ftray.data.decompress import MAX_RATIO, MAX_RECORD_BYTES, check_columns
from ftray.errors import DataError

# Extension types whose values are plain: pyarrow itself implements them, in C++.
HARMLESS_TYPES = frozenset({"arrow.json", "arrow.uuid", "arrow.bool8"})
EXTENSION_KEY = b"ARROW:extension:name"
MAX_COLUMNS = 10_000
READ_AHEAD = 1 << 16
BATCH_ROWS = 256
FREE_BYTES = 1 << 28  # every row group may expand to this size
VALUE_BYTES = 64  # minimum size of a value as a Python object
FREE_VALUES = 100_000  # every file may have this many rows, and values in a column
VALUES_PER_BYTE = 8
EXPANDING_CODECS = ("GZIP", "ZSTD", "BROTLI")  # the others expand by 255 at most


class ParquetShard:
    """An open Parquet file.

    Raises:
        DataError: The file is damaged, has a forbidden extension type, a duplicate column, or more values than a file of its
            size plausibly contains.
    """

    def __init__(self, uri: str) -> None:
        import pyarrow.parquet as pq

        self._uri = uri
        with explained(uri):
            self._size, _ = storage.size_and_etag(uri)
            metadata = pq.read_metadata(self._open())
            check_schema(metadata.schema.to_arrow_schema(), uri)
            _check_counts(metadata, self._size, uri)
            # Text read as a dictionary loses its extension type, so the schema is checked without and with it.
            self._file = pq.ParquetFile(self._open(), read_dictionary=_text_columns(metadata), metadata=metadata)
            check_schema(self._file.schema_arrow, uri)
        self.metadata = metadata

    def _open(self) -> Any:
        if storage.is_remote(self._uri):
            return io.BufferedReader(StoredFile(self._uri), READ_AHEAD)
        return self._uri

    def edges(self, chunk_bytes: int) -> list[int]:
        """The row groups at which chunks of about `chunk_bytes` start, and the end."""
        edges, size = [0], 0
        for group in range(self.metadata.num_row_groups):
            size += self.metadata.row_group(group).total_byte_size
            if size >= chunk_bytes or group == self.metadata.num_row_groups - 1:
                edges.append(group + 1)
                size = 0
        return edges

    def read(self, start: int, end: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number in the file, value) of each record of the row groups [start, end), with few in memory at a time.

        Raises:
            DataError: The file is damaged, or a record or a page is too large.
        """
        number = sum(self.metadata.row_group(g).num_rows for g in range(start))
        for group in range(start, end):
            with explained(self._uri):
                self._check_pages(group)
            batches = self._file.iter_batches(BATCH_ROWS, [group], use_threads=False)
            while (rows := self._next_rows(batches, number)) is not None:
                for row in rows:
                    yield number, row
                    number += 1

    def _next_rows(self, batches: Iterator[Any], number: int) -> Iterator[dict[str, Any]] | None:
        with explained(self._uri):
            batch = next(batches, None)
            if batch is None:
                return None
            if decoded_bytes(batch) <= MAX_RECORD_BYTES:
                return iter(batch.to_pylist())
        return self._one_by_one(batch, number)

    def _one_by_one(self, batch: Any, number: int) -> Iterator[dict[str, Any]]:
        for at in range(batch.num_rows):
            row = batch.slice(at, 1)
            with explained(self._uri):
                if decoded_bytes(row) > MAX_RECORD_BYTES:
                    raise DataError(
                        f"{self._uri}: record {number + at} takes more than {MAX_RECORD_BYTES >> 20} MiB; split it or remove it"
                    )
                (value,) = row.to_pylist()
            yield value

    def _check_pages(self, group: int) -> None:
        """Limits the expanded size of a row group's pages by their headers, which is the size that pyarrow would allocate."""
        columns = [self.metadata.row_group(group).column(c) for c in range(self.metadata.num_columns)]
        packed = [column for column in columns if column.compression in EXPANDING_CODECS]
        if not packed:
            return
        with _opened(self._open()) as file:
            sizes = [size for column in packed for size in page_sizes(file, column)]
        expanded, compressed = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
        if expanded > FREE_BYTES and expanded > MAX_RATIO * compressed:
            raise DataError(
                f"{self._uri}: row group {group} expands from {compressed} to {expanded} bytes, more than {MAX_RATIO}-fold; "
                "write the file again without such padding"
            )


def check_schema(schema: Any, uri: str) -> None:
    """Rejects extension types outside HARMLESS_TYPES, at any depth, and duplicate columns.

    Args:
        schema: A pyarrow schema from a file.
        uri: The file, for the message.

    Raises:
        DataError: The schema has such a type or column.
    """
    import pyarrow as pa

    check_columns(uri, schema.names, MAX_COLUMNS)
    for column in schema:
        waiting: list[Any] = [column]
        while waiting:
            item = waiting.pop()
            dtype = item
            if isinstance(item, pa.Field):
                # An unregistered type arrives as its storage type, with its name in the metadata.
                _check_extension((item.metadata or {}).get(EXTENSION_KEY), column.name, uri)
                dtype = item.type
            if isinstance(dtype, pa.BaseExtensionType):
                _check_extension(dtype.extension_name.encode(), column.name, uri)
                waiting.append(dtype.storage_type)
                continue
            waiting += [dtype.field(i) for i in range(dtype.num_fields)]
            if pa.types.is_dictionary(dtype) or pa.types.is_run_end_encoded(dtype):
                waiting.append(dtype.value_type)


def _check_extension(name: bytes | None, column: str, uri: str) -> None:
    text = "" if name is None else name.decode("utf-8", "backslashreplace")
    if name is not None and text not in HARMLESS_TYPES:
        raise DataError(
            f"{uri}: the column {column!r} has the extension type {text[:80]!r}, whose values may run code when they are read; "
            "write the column as plain strings, numbers, lists or structs"
        )


def decoded_bytes(values: Any) -> int:
    """The approximate size in bytes of a record batch or array as Python objects.

    Text in a dictionary counts as often as it occurs.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.RecordBatch):
        return sum(decoded_bytes(column) for column in values.columns)
    dtype, own = values.type, VALUE_BYTES * len(values)
    if pa.types.is_dictionary(dtype):
        words = values.dictionary
        if pa.types.is_string(dtype.value_type) or pa.types.is_binary(dtype.value_type):
            lengths = pc.binary_length(words).take(values.indices)
            return own + int(pc.sum(lengths).as_py() or 0)
        return own + decoded_bytes(words)
    if pa.types.is_struct(dtype):
        return own + sum(decoded_bytes(part) for part in values.flatten())
    if pa.types.is_map(dtype):
        low, high = (values.offsets[i].as_py() if len(values) else 0 for i in (0, -1))
        return own + sum(decoded_bytes(part.slice(low, high - low)) for part in (values.keys, values.items))
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype):
        return own + decoded_bytes(values.flatten())
    if isinstance(dtype, pa.BaseExtensionType):
        return own + decoded_bytes(values.storage)
    return own + int(values.nbytes)


def _text_columns(metadata: Any) -> list[str]:
    """Columns of text and bytes. They are read as dictionaries, so that repeated text is stored once."""
    schema = metadata.schema
    columns = [schema.column(i) for i in range(metadata.num_columns)]
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _check_counts(metadata: Any, size: int, uri: str) -> None:
    limit = FREE_VALUES + VALUES_PER_BYTE * size
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    values = [sum(group.column(c).num_values for group in groups) for c in range(metadata.num_columns)]
    if max([rows, *values]) > limit or rows > FREE_VALUES + size or min([0, rows, *values]) < 0:
        raise DataError(
            f"{uri} holds {rows} records, {max([0, *values])} values in one column, in {size} bytes; this "
            "cannot be training data. Remove its empty or repeated records"
        )


class StoredFile(io.RawIOBase):
    """A local or stored file that reads ranges on demand."""

    def __init__(self, uri: str) -> None:
        self._uri, self._at = uri, 0
        self._size, _ = storage.size_and_etag(uri)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = storage.read_range(self._uri, self._at, end) if self._at < end else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def _opened(source: Any) -> Iterator[Any]:
    if isinstance(source, str):
        with open(source, "rb") as file:
            yield file
    else:
        yield source


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Converts pyarrow's errors for a damaged or hostile file to DataError."""
    import pyarrow as pa

    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
        RecursionError,
        MemoryError,
    ) as err:
        if isinstance(err, OSError) and err.errno is not None:
            raise  # a problem of the disk, not of the file, and perhaps temporary
        first = (str(err).splitlines() or ["damaged"])[0][:200]
        raise DataError(f"{uri} is not a whole parquet file ({first}); write it again") from None


HEADER_BYTES = 256  # first read; the sizes are at the start, but statistics can make a header longer
MAX_HEADER_BYTES = 1 << 20
MAX_DEPTH = 8
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


def page_sizes(file: Any, column: Any) -> Iterator[tuple[int, int]]:
    """Yields the (expanded, compressed) size in bytes of each page of a column chunk.

    Args:
        file: The Parquet file, open for reading bytes.
        column: pyarrow's ColumnChunkMetaData.

    Raises:
        ValueError: A header is damaged.
    """
    at, dictionary = column.data_page_offset, column.dictionary_page_offset
    if column.has_dictionary_page and dictionary is not None and 0 < dictionary < at:
        at = dictionary
    end = at + column.total_compressed_size
    while at < end:
        header, length = _header(file, at)
        expanded, compressed = header.get(2), header.get(3)
        if not isinstance(expanded, int) or not isinstance(compressed, int) or expanded < 0 or compressed < 0:
            raise ValueError("a page header is damaged")
        yield expanded, compressed
        at += length + compressed


def _header(file: Any, at: int) -> tuple[dict[int, Any], int]:
    size = HEADER_BYTES
    while True:
        file.seek(at)
        data = file.read(size)
        try:
            return _Reader(data).struct_and_length()
        except IndexError:
            if len(data) < size or size >= MAX_HEADER_BYTES:
                raise ValueError("a page header is damaged") from None
            size *= 8


class _Reader:
    """Reads Thrift's compact protocol, as far as page headers use it. Raises IndexError at the end of the bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct_and_length(self) -> tuple[dict[int, Any], int]:
        """The fields of a struct by number, and the struct's size in bytes."""
        return self._struct(0), self._at

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a page header is damaged")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _struct(self, depth: int) -> dict[int, Any]:
        if depth > MAX_DEPTH:
            raise ValueError("a page header is damaged")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 0x0F, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind == BYTE:
            return self._byte()
        if kind in (I16, I32, I64):
            return self._signed()
        if kind == STRUCT:
            return self._struct(depth + 1)
        if kind in (DOUBLE, BINARY):
            size = 8 if kind == DOUBLE else self._varint()
            self._at += size
            if self._at > len(self._data):
                raise IndexError
            return None
        raise ValueError("a page header is damaged")  # page headers have no lists, sets or maps
