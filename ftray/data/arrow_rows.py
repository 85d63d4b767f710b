"""Turns Arrow record batches into records: JSON columns are decoded, and nulls that Arrow fills into structs are absent.

All structs of an Arrow column have the same fields, so a field that a record does not have is null there. Such a field is left
out, at any depth. A column that is null stays. `datasets` stores values of
differing types as JSON text with the extension type `arrow.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ftray.chat.json_text import RepeatedKey, parse_json
from ftray.data.decompress import MAX_RECORD_BYTES
from ftray.errors import DataError

VALUE_BYTES = 64  # minimum size of a value as a Python object
EXTENSION_KEY = b"ARROW:extension:name"
JSON_TYPE = "arrow.json"
Decoder = Callable[[Any], Any]


def is_any(_name: str) -> bool:
    """The choice of all columns."""
    return True


def choose_columns(
    names: Sequence[str], needs: Callable[[str], bool], required: Collection[str], uri: str
) -> list[str]:
    """The columns of a file that are read.

    Args:
        names: The columns of the file.
        needs: Whether a column is read.
        required: Columns that the file must have.
        uri: The file, for the message.

    Raises:
        DataError: A required column is missing, or no column is read.
    """
    chosen = [name for name in names if needs(name)]
    missing = sorted(set(required).difference(names))
    if missing or not chosen:
        what = f"no column {missing[0]!r}" if missing else "none of the required columns"
        raise DataError(f"{uri} has {what}; it has {', '.join(names[:20])}")
    return chosen


def decoders(schema: Any) -> dict[str, Decoder]:
    """For each column whose values need decoding, the function that does it. schema: a pyarrow schema."""
    pairs = ((field.name, _decoder(field)) for field in schema)
    return {name: decode for name, decode in pairs if decode is not None}


def rows(batch: Any, decode: dict[str, Decoder], uri: str, first: int) -> Iterator[dict[str, Any]]:
    """Yields the records of a pyarrow record batch.

    Args:
        batch: The record batch.
        decode: From `decoders`, for the schema of the file.
        uri: The file, for messages.
        first: The number of the first record in the file, for messages.

    Raises:
        DataError: A record is larger than MAX_RECORD_BYTES, or has a value that Python cannot represent, a date in the year
            3,000,000 for example.
    """
    if _size(batch, uri) <= MAX_RECORD_BYTES:
        yield from _all_rows(batch, decode, uri)
        return
    for at in range(batch.num_rows):
        row = batch.slice(at, 1)
        if _size(row, uri) > MAX_RECORD_BYTES:
            raise DataError(
                f"{uri}: record {first + at} takes more than {MAX_RECORD_BYTES >> 20} MiB; split it or remove it"
            )
        yield from _all_rows(row, decode, uri)


def _all_rows(batch: Any, decode: dict[str, Decoder], uri: str) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = [_values(batch.column(i), name, decode.get(name), uri) for i, name in enumerate(names)]
    for number in range(batch.num_rows):
        yield {name: column[number] for name, column in zip(names, columns, strict=True)}


def _values(column: Any, name: str, decode: Decoder | None, uri: str) -> list[Any]:
    with explained(uri, f": the column {name!r}", "correct its values, or remove it"):
        values: list[Any] = column.to_pylist()
    return values if decode is None else [None if value is None else decode(value) for value in values]


def _decoder(field: Any) -> Decoder | None:
    """The decoder of a field's values, or None if they stay as they are."""
    import pyarrow as pa

    dtype = field.type
    # A type that is not registered in this process arrives as its storage type, with its name in the metadata.
    name = dtype.extension_name if isinstance(dtype, pa.BaseExtensionType) else None
    if JSON_TYPE in (name, (field.metadata or {}).get(EXTENSION_KEY, b"").decode("utf-8", "replace")):
        return _from_json
    if pa.types.is_struct(dtype):
        parts = {part.name: _decoder(part) for part in (dtype.field(i) for i in range(dtype.num_fields))}
        return lambda value: _without_nulls(value, parts)
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype):
        item = _decoder(dtype.value_field)
        return None if item is None else lambda value: [None if each is None else item(each) for each in value]
    return None


def _without_nulls(value: dict[str, Any], parts: dict[str, Decoder | None]) -> dict[str, Any]:
    kept = {}
    for name, each in value.items():
        if each is not None:
            decode = parts.get(name)
            kept[name] = each if decode is None else decode(each)
    return kept


def _from_json(text: str) -> Any:
    try:
        return parse_json(text)
    except (RepeatedKey, ValueError, RecursionError):
        return text  # the record is rejected for its type


def _size(batch: Any, uri: str) -> int:
    with explained(uri):
        return decoded_bytes(batch)


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


@contextmanager
def explained(uri: str, part: str = "", remedy: str = "write it again") -> Iterator[None]:
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
        raise DataError(f"{uri}{part} cannot be read ({first}); {remedy}") from None
