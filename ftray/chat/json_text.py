"""JSON of training records, read strictly: a key that occurs twice in an object is an error, because one value would be lost."""

from __future__ import annotations

import json
from typing import Any

from ftray.errors import DataError


class RepeatedKey(DataError):
    """An object has the same key twice."""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        RepeatedKey: An object has the same key twice.
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=unique_keys)


def check_writable(value: object, what: str) -> None:
    """Raises DataError if JSON cannot represent a value: it has a number that is not finite, or is nested too deeply.

    Args:
        value: The value.
        what: Names it in the message.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as err:
        reason = "a number in it is not finite" if str(err).startswith("Out of range float") else str(err)
        raise DataError(f"{what} cannot be written as JSON: {reason}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` that raises RepeatedKey."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKey(f"the key {key!r} occurs twice in an object")
    return value
