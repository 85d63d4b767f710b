"""JSON files of a run: read as an object, or refused with a sentence that says what is wrong with them.

A file may be truncated, filled with zeros, of another type or nested thousands deep: a crash, a full disk and another
program leave such files behind. Every reader of JSON in storage goes through here, so that none ends in a traceback.
"""

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ftray.errors import StorageError
from ftray.storage import files
from ftray.storage.address import MissingFile

RESTORE = "restore it from a copy"
Plain = TypeVar("Plain")


class DamagedFile(StorageError):
    """A file that is there, but does not hold what its writer wrote."""


def parse_object(data: bytes | str) -> dict[str, Any]:
    """The JSON object in `data`. Raises ValueError that says what it holds instead."""
    if not data.strip():
        raise ValueError("it is empty")
    raw = data if isinstance(data, bytes) else data.encode()
    if not raw.strip(b"\0"):
        raise ValueError("it holds only zeros")
    try:
        tree = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # UnicodeDecodeError is one, too
        raise ValueError("it is not JSON") from None
    if not isinstance(tree, dict):
        kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
        raise ValueError(f"it holds {kinds.get(type(tree), 'a number')} instead of an object")
    return tree


def read_object(uri: str, remedy: str = RESTORE) -> dict[str, Any]:
    """The JSON object in a file. Raises MissingFile, DamagedFile with the remedy, StorageError."""
    data = files.read_bytes(uri)
    try:
        return parse_object(data)
    except ValueError as error:
        raise DamagedFile(f"{uri} is damaged ({error}); {remedy}") from None


def find_object(uri: str, remedy: str = RESTORE) -> dict[str, Any] | None:
    """As `read_object`; None where there is no such file."""
    try:
        return read_object(uri, remedy)
    except MissingFile:
        return None


def parse_as(kind: type[Plain], tree: object) -> Plain:
    """A dataclass out of plain values, every field of it checked. Raises ValueError that names the first wrong one."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    try:
        value: Plain = _adapters[kind].validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None
    return value


_adapters: dict[type, TypeAdapter[Any]] = {}
