"""The work of a chat template, counted: steps of a rendering, and operands that must be bounded before the work is done.

Counted is what C code does in one call, too: by the size of what goes in and comes out. Knows plain values; no Jinja2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Sequence, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from types import GeneratorType
from typing import Any

CHARS_A_STEP = 64  # characters that C code handles in about the time of a step
ITEMS_A_STEP = 8  # items of a list or nodes of a loop's body, likewise
MAX_CHARS = 1 << 24  # of any text
MAX_NUMBER = 1 << 24
MAX_INDENT = 64
MAX_PARTS = 16  # of a dotted attribute
VALUE_CHARS = 80  # of a number that is written out
VIEWS = (KeysView, ValuesView, ItemsView)
NESTED = (list, tuple, dict, *VIEWS)
SIZED = (str, bytes, range, *NESTED)
# Where filters take the name of an attribute: from and up to which place; `attribute=` is another.
ATTRIBUTES = {"selectattr": (2, 3), "rejectattr": (2, 3), "join": (3, 4), "map": (0, 0)} | dict.fromkeys(
    ("sort", "unique", "min", "max"), (2, None)
)
# A width or precision of five digits or more, one that is an argument, and a field inside a field's format.
WIDE = re.compile(r"\d{5,}|\*|\{[^{}]*\{")


class TemplateLimitError(Exception):
    """A template that does more than rendering a conversation can need."""


@dataclass
class Meter:
    """One rendering: the steps that are left, what was written, and where the generation marks are."""

    left: int
    marks: list[tuple[int, int]] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    num_written: int = 0  # characters

    def write(self, piece: str) -> None:
        self.written.append(piece)
        self.num_written += len(piece)
        check_result(self.num_written)

    def take(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise TemplateLimitError("the chat template does too much work for this conversation; it may not end")


current: ContextVar[Meter] = ContextVar("meter")


def spend(value: Any, steps: int = 1) -> Any:
    """Counts steps; returns the value. As a filter it stands in loops, macros and conditions of loops."""
    current.get().take(steps)
    return value


def sized(value: Any) -> Any:
    """Counts a value by its own size; returns it. An iterator is read at once and counted with all that it yields:
    thousands of lazy ones, each reading from the one before, would overflow C's stack."""
    if is_iterator(value):
        return iter(list(counted(value)))
    size = len(value) if isinstance(value, SIZED) else 0
    if size > MAX_CHARS:
        raise TemplateLimitError("the chat template makes a text that is too long; it may not end")
    per_step = CHARS_A_STEP if isinstance(value, (str, bytes)) else ITEMS_A_STEP
    current.get().take(1 + size // per_step)
    return value


def is_iterator(value: Any) -> bool:
    """Whether a value yields others and nothing else. Jinja's `loop` does so too, but templates ask it for more."""
    return isinstance(value, GeneratorType) or (isinstance(value, Iterator) and type(value).__module__ == "builtins")


def counted(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        yield weighed(value)


def weighed(value: Any) -> Any:
    """Counts a value and all that is in it: lists of lists of lists may be small and their text without end."""
    if isinstance(value, NESTED):
        measure(value)
        return value
    return counted(value) if is_iterator(value) else sized(value)


def measure(value: Any) -> tuple[int, int, int]:
    """Counts a value and all that is in it. Returns (values, characters, depth)."""
    waiting, number, chars, deepest = [(value, 1)], 0, 0, 1
    while waiting:
        each, depth = waiting.pop()
        if not is_iterator(each):  # that would read it
            sized(each)
        number, deepest = number + 1, max(deepest, depth)
        if isinstance(each, str):
            chars += len(each)
        elif isinstance(each, dict):
            waiting += [(inner, depth + 1) for pair in each.items() for inner in pair]
        elif isinstance(each, NESTED):
            waiting += [(inner, depth + 1) for inner in each]
    return number, chars, deepest


def check_result(size: int) -> None:
    if size > MAX_CHARS:
        raise TemplateLimitError("the chat template makes a text that is too long; it may not end")


def bounded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter or a test with bounded operands and a counted result."""

    @wraps(function)  # keeps Jinja's marks of functions that take the context
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            weighed(value)
        args = prepared(name, args)
        check_operands(name, args, kwargs)
        return sized(function(*args, **kwargs))

    return call


def prepared(name: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """Operands whose iterators count what they yield; for `join` a list, whose length is known before the work."""
    if name == "join":
        return tuple(list(counted(iter(a))) if isinstance(a, (Iterator, range)) else a for a in args)
    return tuple(counted(a) if is_iterator(a) else a for a in args)


def check_operands(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuses, before the work, what would make a giant of small things. The first text or list is what it works on."""
    values = [*args, *kwargs.values()]
    if any(isinstance(v, int) and abs(v) > MAX_NUMBER for v in values):
        raise TemplateLimitError(f"the chat template calls {name} with a number that is too large")
    texts = [v for v in values if isinstance(v, str)]
    if name in ATTRIBUTES:
        _check_attribute(name, args, kwargs)
    if name == "format":
        check_format(str(values[0]) if values else "", values[1:])
    elif name in ("list", "sort", "unique", "title") and texts:
        current.get().take(len(texts[0]))  # each character may become a text
    elif name in ("split", "rsplit", "splitlines") and texts:
        parts = texts[0].count(texts[1]) if len(texts) > 1 and texts[1] else len(texts[0]) // ITEMS_A_STEP
        current.get().take(parts)
    elif name == "replace" and len(texts) > 2:
        check_result(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join":
        lists = [v for v in values if isinstance(v, NESTED)]
        sizes = [measure(each) for each in lists]
        check_result(sum(chars + number * sum(map(len, texts)) for number, chars, _ in sizes))
        if texts and not lists:  # the characters of a text, or a generator, which counts itself
            check_result(max(map(len, texts)) * (1 + min(map(len, texts))))
    elif name in ("indent", "tojson"):
        _check_indent(name, args, kwargs)
    if name in ("strip", "lstrip", "rstrip", "trim", "rfind", "rindex", "rsplit", "rpartition") and len(texts) > 1:
        current.get().take(len(texts[0]) * len(texts[1]) // CHARS_A_STEP)  # Python tries each place with each character


def _check_attribute(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    start, end = ATTRIBUTES[name]
    for value in [*args[start:end], kwargs.get("attribute")]:
        if isinstance(value, str) and value.count(".") + value.count(",") >= MAX_PARTS:
            raise TemplateLimitError(f"the chat template calls {name} with an attribute of too many parts")


def _check_indent(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    subject, *others = args
    numbers = [*others, *kwargs.values()]
    numbers += [inner for value in numbers if isinstance(value, (list, tuple)) for inner in value]  # separators
    widths = [len(v) if isinstance(v, str) else int(v or 0) for v in numbers if isinstance(v, (str, int))]
    width = max(widths, default=4)
    if width > MAX_INDENT:
        raise TemplateLimitError(f"the chat template calls {name} with a number that is too large")
    if name == "indent" and isinstance(subject, str):
        check_result(len(subject) + width * (subject.count("\n") + 1))
    elif name == "tojson":
        number, chars, depth = measure(subject)
        check_result(6 * chars + number * (depth + 1) * (width + 2))


def check_format(text: str, shown: Sequence[Any] = ()) -> None:
    """A short text without wide fields, each of which may show every value."""
    if WIDE.search(text) or len(text) > MAX_CHARS >> 12:
        raise TemplateLimitError("the chat template formats a text that is too wide")
    number, chars, _ = measure(list(shown))
    check_result((text.count("{") + text.count("%")) * (chars + VALUE_CHARS * number))


def check_operator(operator: str, left: Any, right: Any) -> None:
    numbers = [side for side in (left, right) if isinstance(side, (int, float))]
    if any(abs(n) > 1 << 256 for n in numbers) or (
        operator == "**" and (len(numbers) < 2 or abs(left) > 1 << 16 or abs(right) > 64)
    ):
        raise TemplateLimitError("the chat template makes a number that is too large")
    if operator == "%" and isinstance(left, str):
        check_format(left, [right])
    if operator == "*" and len(numbers) < 2:
        size = 1
        for side in (left, right):
            size *= len(side) if isinstance(side, SIZED) else abs(side)
        check_result(size)
