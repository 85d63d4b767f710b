"""Reads untrusted Arrow files, as `Dataset.save_to_disk` of the library `datasets` writes them, by record batch.

The headers of the messages are parsed here, so that a file can be cut without reading it, and so that a header that announces
more than the file holds is rejected before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ftray import storage
from ftray.data.arrow_rows import choose_columns, decoders, explained, is_any, rows
from ftray.data.parquet import BATCH_ROWS, FREE_VALUES, check_schema
from ftray.errors import DataError

HEAD_BYTES = 1 << 14  # first read of a message; its header is almost always smaller
MAX_HEADER_BYTES = 1 << 22
FILE_MAGIC = b"ARROW1\0\0"  # the stream follows it in a file of the random access format
CONTINUES = 0xFFFFFFFF
SCHEMA, DICTIONARY, BATCH = 1, 2, 3


@dataclass(frozen=True)
class _Message:
    """A message of the stream. start, body, end: byte offsets in the file. num_rows: of a record batch."""

    kind: int
    start: int
    body: int
    end: int
    num_rows: int
    is_compressed: bool


class ArrowShard:
    """An open Arrow file: a stream of record batches, or the random access format.

    Raises:
        DataError: The file is damaged, compressed inside, uses dictionaries, or has a forbidden extension type.
    """

    def __init__(self, uri: str) -> None:
        import pyarrow as pa

        self._uri = uri
        self._size, _ = storage.size_and_etag(uri)
        start = len(FILE_MAGIC) if storage.read_range(uri, 0, len(FILE_MAGIC)) == FILE_MAGIC else 0
        head = self._message(start)
        if head is None or head.kind != SCHEMA:
            raise self._damaged("it does not begin with a schema")
        with explained(uri):
            self._schema = pa.ipc.read_schema(pa.py_buffer(storage.read_range(uri, head.start, head.end)))
        check_schema(self._schema, uri)
        self._first = head.end

    def edges(self, chunk_bytes: int) -> list[int]:
        """The byte offsets at which chunks of about `chunk_bytes` start, and the end of the last record batch."""
        edges, last = [self._first], self._first
        for message in self._batches():
            last = message.end
            if last - edges[-1] >= chunk_bytes:
                edges.append(last)
        return edges if edges[-1] == last else [*edges, last]

    def read(
        self, start: int, end: int, needs: Callable[[str], bool] = is_any, required: Collection[str] = ()
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number in the file, value) of each record of the record batches in bytes [start, end).

        Args:
            start: Byte offset of the first record batch.
            end: Byte offset after the last one.
            needs: Whether a column is read.
            required: Columns that the file must have.

        Raises:
            DataError: The file is damaged, or a record is too large.
        """
        import pyarrow as pa

        names = choose_columns(self._schema.names, needs, required, self._uri)
        decode, number = decoders(self._schema), 0
        for message in self._batches():
            if message.start >= end:
                return
            if message.start < start:
                number += message.num_rows
                continue
            data = pa.py_buffer(storage.read_range(self._uri, message.start, message.end))
            with explained(self._uri):
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(data), self._schema).select(names)
                batch.validate(full=True)
            for at in range(0, batch.num_rows, BATCH_ROWS):
                for row in rows(batch.slice(at, BATCH_ROWS), decode, self._uri, number):
                    yield number, row
                    number += 1

    def _batches(self) -> Iterator[_Message]:
        at = self._first
        while (message := self._message(at)) is not None:
            if message.kind == DICTIONARY:
                raise self._damaged("it contains dictionaries; write these columns as plain values")
            if message.kind == BATCH:
                if message.is_compressed:
                    raise self._damaged("its buffers are compressed; write it without compression")
                yield message
            at = message.end

    def _message(self, start: int) -> _Message | None:
        """The message at a byte offset, or None at the end of the stream."""
        data = storage.read_range(self._uri, start, min(start + HEAD_BYTES, self._size))
        if len(data) < 4:
            return None
        at = 4 if _number(data, 0, 4) == CONTINUES else 0  # files of the first versions lack this mark
        length = _number(data, at, 4) if len(data) >= at + 4 else 0
        if length == 0:
            return None
        body = start + at + 4 + length
        if length > MAX_HEADER_BYTES or body > self._size:
            raise self._damaged(f"the message at byte {start} is cut")
        if body - start > len(data):
            data = storage.read_range(self._uri, start, body)
        try:
            kind, body_bytes, num_rows, is_compressed = _parse_header(data[at + 4 : body - start])
        except (IndexError, ValueError):
            raise self._damaged(f"the header at byte {start} is wrong") from None
        if body + body_bytes > self._size:
            raise self._damaged(f"the message at byte {start} is cut")
        if num_rows > FREE_VALUES + body_bytes:
            raise self._damaged(f"it announces {num_rows} records in {body_bytes} bytes")
        return _Message(kind, start, body, body + body_bytes, num_rows, is_compressed)

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self._uri} cannot be read as an Arrow file: {reason}")


def _parse_header(data: bytes) -> tuple[int, int, int, bool]:
    """(kind, bytes of the body, rows, whether the body is compressed) of a message's flatbuffer.

    Raises:
        IndexError: The flatbuffer ends too early.
        ValueError: A number is negative.
    """
    message = _number(data, 0, 4)
    kind_at, header_at, body_at = (_field(data, message, n) for n in (1, 2, 3))
    kind = _number(data, kind_at, 1) if kind_at else 0
    body_bytes = _number(data, body_at, 8) if body_at else 0
    if kind != BATCH or not header_at:
        return kind, body_bytes, 0, False
    batch = header_at + _number(data, header_at, 4)
    rows_at = _field(data, batch, 0)
    return kind, body_bytes, _number(data, rows_at, 8) if rows_at else 0, bool(_field(data, batch, 3))


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies, or 0 if it is absent."""
    vtable = table - int.from_bytes(_bytes(data, table, 4), "little", signed=True)
    if 4 + 2 * number >= _number(data, vtable, 2):
        return 0
    offset = _number(data, vtable + 4 + 2 * number, 2)
    return table + offset if offset else 0


def _number(data: bytes, at: int, size: int) -> int:
    value = int.from_bytes(_bytes(data, at, size), "little")
    if size == 8 and value >= 1 << 63:
        raise ValueError("negative")
    return value


def _bytes(data: bytes, at: int, size: int) -> bytes:
    if at < 0 or at + size > len(data):
        raise IndexError
    return data[at : at + size]
