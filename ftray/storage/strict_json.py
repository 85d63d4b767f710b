"""JSON from people who are not trusted: size, depth, numbers and keys are bounded before anything is built from it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

MAX_DEPTH = 64
MAX_DIGITS = 400  # of an integer: float64's largest has 309
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def parse(data: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """Parses UTF-8 JSON strictly.

    Args:
        data: The document.
        max_bytes: The largest document that is parsed.
        max_depth: The deepest nesting of arrays and objects that is parsed.

    Returns:
        What `json.loads` returns.

    Raises:
        ValueError: The document is too large, nested too deeply, not UTF-8 or not JSON; it repeats a key, holds NaN, an
            infinite or endless number, or half a surrogate pair. The message says which, without quoting long values.
    """
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data)} bytes, and at most {max_bytes} are allowed")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(f"it is not UTF-8 (byte {err.start})") from None
    _check_depth(text, max_depth)
    try:
        tree = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\u" in text and _has_surrogate(tree):  # a pair of escapes is one character by now
        raise ValueError("it holds half a surrogate pair, which is not a character")
    return tree


def _check_depth(text: str, max_depth: int) -> None:
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        if bracket[0] in "[{":
            depth += 1
            if depth > max_depth:
                raise ValueError(f"it is nested more than {max_depth} levels deep")
        else:
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated[:40]!r} appears twice in one object")
    return tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits, and at most {MAX_DIGITS} are allowed")
    return int(text)


def _has_surrogate(tree: Any) -> bool:
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
