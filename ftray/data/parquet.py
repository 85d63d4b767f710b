"""Reads untrusted Parquet files by row group, within limits that make a hostile file harmless.

A Parquet file can name Arrow extension types, and a type that is registered in this process may run code when its
values are read (`ray.data.arrow_pickled_object` unpickles them). Only types on a short list are therefore read. A small file
can also contain billions of values, or pages that expand a thousandfold, so both are limited before anything is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ftray import storage
from ftray.data.arrow_rows import EXTENSION_KEY, JSON_TYPE, choose_columns, decoders, explained, is_any, rows
from ftray.data.decompress import MAX_RATIO, check_columns
from ftray.data.parquet_pages import page_sizes
from ftray.errors import DataError

# Extension types whose values are plain: pyarrow itself implements them, in C++.
HARMLESS_TYPES = frozenset({JSON_TYPE, "arrow.uuid", "arrow.bool8"})
MAX_COLUMNS = 10_000
READ_AHEAD = 1 << 16
BATCH_ROWS = 256
FREE_BYTES = 1 << 28  # every row group may expand to this size
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
            schema = metadata.schema.to_arrow_schema()
            check_schema(schema, uri)
            _check_counts(metadata, self._size, uri)
            # Text read as a dictionary loses its extension type, so the schema is checked without and with it.
            self._file = pq.ParquetFile(self._open(), read_dictionary=_text_columns(metadata), metadata=metadata)
            check_schema(self._file.schema_arrow, uri)
        self.metadata = metadata
        self._names: list[str] = schema.names
        self._decoders = decoders(schema)

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

    def read(
        self, start: int, end: int, needs: Callable[[str], bool] = is_any, required: Collection[str] = ()
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number in the file, value) of each record of the row groups [start, end), with few in memory at a time.

        Args:
            start: The first row group.
            end: The row group after the last one.
            needs: Whether a column is read.
            required: Columns that the file must have.

        Raises:
            DataError: The file is damaged, or a record or a page is too large.
        """
        number = sum(self.metadata.row_group(g).num_rows for g in range(start))
        names = choose_columns(self._names, needs, required, self._uri)
        for group in range(start, end):
            with explained(self._uri):
                self._check_pages(group, names)
            batches = self._file.iter_batches(BATCH_ROWS, [group], columns=names, use_threads=False)
            while (batch := self._next(batches)) is not None:
                for row in rows(batch, self._decoders, self._uri, number):
                    yield number, row
                    number += 1

    def _next(self, batches: Iterator[Any]) -> Any:
        with explained(self._uri):
            return next(batches, None)

    def _check_pages(self, group: int, names: Sequence[str]) -> None:
        """Limits the expanded size of a row group's pages by their headers, which is the size that pyarrow would allocate."""
        columns = [self.metadata.row_group(group).column(c) for c in range(self.metadata.num_columns)]
        read = [column for column in columns if _belongs_to(column.path_in_schema, names)]
        packed = [column for column in read if column.compression in EXPANDING_CODECS]
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


def _belongs_to(path: str, names: Sequence[str]) -> bool:
    """Whether a column chunk is part of one of the columns; pyarrow selects columns by this rule."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


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
