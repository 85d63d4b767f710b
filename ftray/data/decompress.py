"""Streams untrusted compressed files and long records within limits.

A few megabytes of gzip can expand to gigabytes. The expansion ratio of a file and the size of a record are therefore limited.
A file beyond the limits is rejected by name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

from ftray.chat.json_text import RepeatedKey, unique_keys
from ftray.errors import DataError

MAX_RATIO = 200  # JSON lines of real data compress by 3 to 20, repetitions of one template by 100
FREE_BYTES = 1 << 23  # every file may expand to this size
MAX_RECORD_BYTES = 1 << 24  # four million tokens of English
PIECE_BYTES = 1 << 18
ZSTD_PIECE_BYTES = 1 << 12  # a block of four bytes may expand to 128 KiB, so 4 KiB of them to 128 MiB
ZSTD_WINDOW_BYTES = 1 << 27
MAX_COLUMNS = 1024  # of a CSV file: even a row of two bytes gets a value per column
BLANKS = " \t\r\n"


def expanded(uri: str, source: Any) -> Iterator[bytes]:
    """Yields the content of a file in pieces, decompressed by its suffix.

    The output size is compared with the input size, so that a file that expands too far is rejected early. The first FREE_BYTES
    are held back, so that most such files are rejected before any record is processed.

    Args:
        uri: The file, for its suffix (`.gz`, `.zst`) and for messages.
        source: The file, open for reading bytes.

    Raises:
        DataError: The file is damaged or expands too far.
    """
    total, held_back = 0, []
    for piece in _pieces(uri, source):
        total += len(piece)
        if total > FREE_BYTES and uri.lower().endswith((".gz", ".zst")) and total > MAX_RATIO * (size := source.tell()):
            raise DataError(
                f"{uri} expands from {size} to more than {total} bytes, over {MAX_RATIO}-fold; decompress it yourself if its "
                "content is what you expect"
            )
        held_back.append(piece)
        if total > FREE_BYTES:
            yield from _cut(held_back)
            held_back.clear()
    yield from _cut(held_back)


def _cut(pieces: list[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), PIECE_BYTES):  # lines of one byte cost eight in a list
            yield piece[at : at + PIECE_BYTES]


def _pieces(uri: str, source: Any) -> Iterator[bytes]:
    if uri.lower().endswith(".zst"):
        yield from _unzstd(uri, source)
        return
    reader: Any = gzip.GzipFile(fileobj=source) if uri.lower().endswith(".gz") else source
    try:
        while piece := reader.read(PIECE_BYTES):
            yield piece
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        raise DataError(f"{uri} is not a whole gzip file ({err}); write it again") from None


def _unzstd(uri: str, source: Any) -> Iterator[bytes]:
    import zstandard

    frame = None
    try:
        while data := source.read(ZSTD_PIECE_BYTES):
            while data:  # a file may contain several frames
                if frame is None:
                    frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise zstandard.ZstdError("it ends in the middle of a frame")
    except zstandard.ZstdError as err:
        raise DataError(f"{uri} is not a whole zstd file ({err}); write it again") from None


def lines(uri: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file without line ends and byte order mark.

    Raises:
        DataError: A line is larger than MAX_RECORD_BYTES.
    """
    rest, number, is_first = b"", 0, True
    for piece in pieces:
        data = rest + piece
        if is_first and len(data) >= 3:
            data, is_first = data.removeprefix(b"\xef\xbb\xbf"), False
        *whole, rest = data.split(b"\n")
        for line in whole:
            number += 1
            check_record(uri, len(line), f"line {number}")
            yield line
        check_record(uri, len(rest), f"line {number + 1}")
    yield rest.removeprefix(b"\xef\xbb\xbf") if is_first else rest


def check_record(uri: str, size_bytes: int, where: str) -> None:
    """Raises DataError for a record that is larger than MAX_RECORD_BYTES."""
    if size_bytes > MAX_RECORD_BYTES:
        raise DataError(
            f"{uri}, {where}: a record of more than {MAX_RECORD_BYTES >> 20} MiB; split it, or write one record a line"
        )


def check_columns(uri: str, names: Sequence[str], limit: int) -> None:
    """Raises DataError for more columns than the limit, and for duplicate columns."""
    if len(names) > limit:
        raise DataError(f"{uri} has {len(names)} columns; the limit is {limit}. Remove columns that are not needed")
    if twice := sorted(name for name, number in Counter(names).items() if number > 1):
        raise DataError(f"{uri} has the column {twice[0]!r} twice; rename one of them")


class _Text(io.TextIOBase):
    """Decoded pieces as an iterable of lines for the csv module, with line ends unchanged."""

    def __init__(self, uri: str, pieces: Iterator[bytes]) -> None:
        self._uri, self._lines = uri, lines(uri, pieces)
        self.row_bytes = 0  # of the current row; its fields may contain line ends

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        before = 0
        for line in self._lines:
            self.row_bytes += len(line) + 1
            check_record(self._uri, self.row_bytes - 1, "a row")
            try:
                yield line.decode() + "\n"
            except UnicodeDecodeError as err:
                raise DataError(f"{self._uri} is not UTF-8 (byte {before + err.start}); convert it") from None
            before += len(line) + 1


def csv_rows(uri: str, pieces: Iterator[bytes]) -> Iterator[dict[Any, Any]]:
    """Yields the rows of a CSV file as dictionaries; fields beyond the header have the key None.

    Raises:
        DataError: The file is not UTF-8 or not CSV, has a duplicate column, a field that is too large, or a quote that is not
            closed. The csv module would read the rows after such a quote as part of the field.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)  # csv's own limit is 128 KB a field
    line = 1  # where the current row begins
    try:
        text = _Text(uri, pieces)
        reader = csv.reader(iter(text), strict=True)
        names: list[str] | None = None
        for row in reader:
            if names is None:
                names = row
                check_columns(uri, names, MAX_COLUMNS)
            elif row:  # not an empty line
                yield _named(names, row)
            text.row_bytes, line = 0, reader.line_num + 1
    except csv.Error as err:
        reason = "a quote is not closed" if "unexpected end of data" in str(err) else f"not CSV: {err}"
        raise DataError(
            f"{uri}, the row that begins in line {line}: {reason}; put quotes around fields that contain commas, quotes or "
            "line ends, and write a quote inside such a field twice"
        ) from None


def _named(names: list[str], row: list[str]) -> dict[Any, Any]:
    record: dict[Any, Any] = dict(zip_longest(names, row[: len(names)]))
    return {**record, None: row[len(names) :]} if len(row) > len(names) else record


def json_records(uri: str, pieces: Iterator[bytes]) -> Iterator[Any]:
    """Yields the records of a .json file: the items of an array, or the lines (as bytes) of a file of JSON lines.

    Raises:
        DataError: The file is neither, is not UTF-8, or has a record that is too large.
    """
    head = b""
    for piece in pieces:
        head += piece
        if head.removeprefix(b"\xef\xbb\xbf").strip():
            break
    rest = chain([head], pieces)
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        yield from _json_items(uri, rest)
        return
    is_first = True
    for line in lines(uri, rest):
        if is_first and line.strip():
            is_first = False
            if not _is_object(line):
                raise DataError(
                    f"{uri} is not a JSON array of records, and its first line is not a record; write [{{…}}, {{…}}], or "
                    "one record a line"
                )
        yield line


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_items(uri: str, pieces: Iterator[bytes]) -> Iterator[Any]:
    window = _Window(uri, pieces)
    try:
        if window.next_character() != "[":
            raise DataError(f"{uri} is not a JSON array of records; write [{{…}}, {{…}}], or one record a line")
        window.skip(1)
        if window.next_character() == "]":
            window.skip(1)
        else:
            while True:
                yield window.item()
                separator = window.next_character()
                window.skip(1)
                if separator == "]":
                    break
                if separator != ",":
                    raise ValueError("Expecting ',' delimiter" if separator else "the text is truncated")
        if window.next_character():
            raise ValueError("Extra data")
    except (ValueError, RecursionError) as err:
        reason = err.msg if isinstance(err, json.JSONDecodeError) else err
        raise DataError(
            f"{uri} is not JSON ({reason}); a .json file is one array of records, or one record a line"
        ) from None


class _Window:
    """The part of a JSON text that is being parsed."""

    def __init__(self, uri: str, pieces: Iterator[bytes]) -> None:
        import codecs

        self._uri, self._pieces = uri, pieces
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._ended = "", 0, False
        self._parse = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode
        self._parse_any = json.JSONDecoder().raw_decode

    def _more(self) -> None:
        if self._at:
            self._text, self._at = self._text[self._at :], 0
        piece = next(self._pieces, None)
        self._ended = piece is None
        self._text += self._decode(piece or b"", self._ended)

    def skip(self, number: int) -> None:
        """Skips characters."""
        self._at += number

    def next_character(self) -> str:
        """Returns the next character that is not blank, without consuming it; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in BLANKS:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def _next_value(self) -> tuple[Any, int]:
        """The value that begins here, and its end. One that repeats a key is its text, so that its record is refused by name."""
        try:
            return self._parse(self._text, self._at)
        except RepeatedKey:
            _, end = self._parse_any(self._text, self._at)
            return self._text[self._at : end].encode(), end

    def item(self) -> Any:
        """Parses the next value. If it is incomplete, the window doubles and parsing starts again."""
        self.next_character()
        while True:
            try:
                value, end = self._next_value()
                if end < len(self._text) or self._ended:  # otherwise a number may continue in the next piece
                    check_record(self._uri, end - self._at, "an item")
                    self._at = end
                    return value
            except json.JSONDecodeError as err:
                if self._ended or (err.pos < len(self._text) - 64 and "Unterminated" not in err.msg):
                    raise
            size = len(self._text) - self._at
            check_record(self._uri, size, "an item")
            while not self._ended and len(self._text) - self._at < 2 * size + 1:
                self._more()
