"""The sizes of a Parquet file's pages, from their headers. A reader allocates these sizes before it decompresses a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
