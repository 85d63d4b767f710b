"""Limits of a chat template's rendering: a budget of counted steps, and bounds on operands, checked before the work is done.

Work in C (joining, searching, formatting, …) is charged by the size of its operands and results. This module knows plain
values and no Jinja2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Sequence, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from types import GeneratorType
from typing import Any

CHARS_PER_STEP = 64  # characters that C code handles in about the time of one step
ITEMS_PER_STEP = 8  # list items or syntax nodes, likewise
MAX_CHARS = 1 << 24  # of any text
MAX_NUMBER = 1 << 24
MAX_INDENT = 64
MAX_DOTS = 15  # in the path of an attribute
NUMBER_CHARS = 80  # of a formatted number
MARK = "\ue0f7"  # in every text that stands for a message's text in a probe rendering
NESTED = (list, tuple, dict, KeysView, ValuesView, ItemsView)
SIZED = (str, bytes, range, *NESTED)
TAKES_ATTRIBUTE = frozenset(["join", "map", "max", "min", "rejectattr", "selectattr", "sort", "unique"])
SEARCHES = frozenset(["lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"])
# Filters and tests that do not look inside a list or an object: a loop over the turns may ask for their number each time.
CONSTANT_TIME = frozenset(
    ["boolean", "count", "defined", "iterable", "length", "mapping", "none", "number", "sequence"]
)
CONSTANT_TIME |= frozenset(["string", "undefined"])
# A width or precision of five digits or more, a width that is an argument, and a field inside a field's format.
WIDE_FORMAT = re.compile(r"\d{5,}|\*|\{[^{}]*\{")


class TemplateLimitError(Exception):
    """The template does more work than rendering a conversation needs."""


@dataclass
class RenderState:
    """One rendering: the remaining steps, the pieces of text so far, and the places of the generation marks."""

    remaining: int
    is_probe: bool = False
    marks: list[tuple[int, int]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    num_chars: int = 0

    def write(self, piece: str) -> None:
        self.pieces.append(piece)
        self.num_chars += len(piece)
        check_size(self.num_chars)

    def charge(self, steps: int) -> None:
        self.remaining -= steps
        if self.remaining < 0:
            raise TemplateLimitError("the chat template does too much work for this conversation; it may not end")


current: ContextVar[RenderState] = ContextVar("current")


def charge(value: Any, steps: int = 1) -> Any:
    """Charges steps and returns the value. Added to loops, macros and loop conditions as a filter."""
    current.get().charge(steps)
    return value


def charge_size(value: Any) -> Any:
    """Charges a value's own size and returns the value.

    An iterator is read at once: a chain of thousands of lazy iterators would overflow C's stack.
    """
    if is_iterator(value):
        return iter(list(charged_items(value)))
    size = len(value) if isinstance(value, SIZED) else 0
    check_size(size)
    current.get().charge(1 + size // (CHARS_PER_STEP if isinstance(value, (str, bytes)) else ITEMS_PER_STEP))
    return value


def charge_tree(value: Any) -> Any:
    """Charges a value with everything inside it and returns it: small nested lists can have an endless text."""
    if isinstance(value, NESTED):
        measure(value)
        return value
    return charged_items(value) if is_iterator(value) else charge_size(value)


def is_iterator(value: Any) -> bool:
    """Whether a value is a plain iterator. Jinja's `loop` is one too, but it has fields that templates use."""
    return isinstance(value, GeneratorType) or (isinstance(value, Iterator) and type(value).__module__ == "builtins")


def charged_items(values: Iterator[Any]) -> Iterator[Any]:
    return (charge_tree(value) for value in values)


def measure(value: Any) -> tuple[int, int, int]:
    """Charges a value with everything inside it. Returns (number of values, characters, depth)."""
    stack, number, chars, deepest = [(value, 1)], 0, 0, 1
    while stack:
        item, depth = stack.pop()
        if not is_iterator(item):  # charging it would read it
            charge_size(item)
        number, deepest = number + 1, max(deepest, depth)
        if isinstance(item, str):
            chars += len(item)
        elif isinstance(item, dict):
            stack += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, NESTED):
            stack += [(inner, depth + 1) for inner in item]
    return number, chars, deepest


def count_chars(value: Any) -> int:
    """The characters of all texts in nested lists and objects. Other values count as one."""
    stack, chars = [value], 0
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            stack += item
        else:
            chars += len(item) if isinstance(item, str) else 1
    return chars


def check_size(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise TemplateLimitError("the chat template makes a text that is too long; it may not end")


def bounded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter or test with bounded operands and a charged result."""

    @wraps(function)  # keeps Jinja's attributes of functions that take the context
    def call(*args: Any, **kwargs: Any) -> Any:
        return charge_size(function(*prepare_call(name, args, kwargs), **kwargs))

    return call


def prepare_call(name: str, args: Sequence[Any], kwargs: dict[str, Any], owner: Any = None) -> list[Any]:
    """Charges and checks the operands of a call. Returns the arguments, with iterators that charge their items.

    Args:
        name: The name of the filter, test or method.
        args: Positional arguments.
        kwargs: Keyword arguments.
        owner: The text or collection of a method.
    """
    subject = [] if owner is None else [owner]
    is_quick = owner is None and name in CONSTANT_TIME and not any(map(is_iterator, args))
    for value in (*subject, *args, *kwargs.values()):
        if is_quick:
            charge_size(value)
        else:
            charge_tree(value)
    if name == "join":  # a list has a known length before the work
        values = [list(charged_items(iter(a))) if isinstance(a, (Iterator, range)) else a for a in args]
    else:
        values = [charged_items(a) if is_iterator(a) else a for a in args]
    check_operands(name, [*subject, *values], kwargs)
    return values


def check_operands(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuses a call that would make something huge of small operands. The first text or list is its subject."""
    values = [*args, *kwargs.values()]
    if any(isinstance(v, int) and abs(v) > MAX_NUMBER for v in values):
        raise TemplateLimitError(f"the chat template calls {name} with a number that is too large")
    texts = [v for v in values if isinstance(v, str)]
    if name in TAKES_ATTRIBUTE and any(
        v.count(".") + v.count(",") > MAX_DOTS for v in values[1:] if isinstance(v, str)
    ):
        raise TemplateLimitError(f"the chat template calls {name} with an attribute of too many parts")
    if name in SEARCHES and len(texts) > 1:  # Python tries each place with each character
        current.get().charge(len(texts[0]) * len(texts[1]) // CHARS_PER_STEP)
    if name == "format":
        check_format(str(values[0]) if values else "", values[1:])
    elif name in ("list", "sort", "unique", "title") and texts:
        current.get().charge(len(texts[0]))  # each character may become a text
    elif name in ("split", "rsplit", "splitlines") and texts:
        has_separator = len(texts) > 1 and texts[1]
        current.get().charge(texts[0].count(texts[1]) if has_separator else len(texts[0]) // ITEMS_PER_STEP)
    elif name == "replace" and len(texts) > 2:
        check_size(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join":
        sizes = [measure(v) for v in values if isinstance(v, NESTED)]
        check_size(sum(chars + number * sum(map(len, texts)) for number, chars, _ in sizes))
        if texts and not sizes:  # the characters of a text
            check_size(max(map(len, texts)) * (1 + min(map(len, texts))))
    elif name in ("indent", "tojson"):
        _check_indent(name, args[0], [*args[1:], *kwargs.values()])


def _check_indent(name: str, subject: Any, options: list[Any]) -> None:
    options += [inner for value in options if isinstance(value, (list, tuple)) for inner in value]  # separators
    widths = [len(v) if isinstance(v, str) else int(v) for v in options if isinstance(v, (str, int))]
    width = max(widths, default=4)
    if width > MAX_INDENT:
        raise TemplateLimitError(f"the chat template calls {name} with a number that is too large")
    if name == "indent" and isinstance(subject, str):
        check_size(len(subject) + width * (subject.count("\n") + 1))
    elif name == "tojson":
        number, chars, depth = measure(subject)
        check_size(6 * chars + number * (depth + 1) * (width + 2))


def check_format(text: str, operands: Sequence[Any] = ()) -> None:
    """Refuses a long format, wide fields, and fields that together write too much: each may write every operand."""
    if WIDE_FORMAT.search(text) or len(text) > MAX_CHARS >> 12:
        raise TemplateLimitError("the chat template formats a text that is too wide")
    number, chars, _ = measure(list(operands))
    check_size((text.count("{") + text.count("%")) * (chars + NUMBER_CHARS * number))


def check_operator(operator: str, left: Any, right: Any) -> None:
    numbers = [side for side in (left, right) if isinstance(side, (int, float))]
    if any(abs(n) > 1 << 256 for n in numbers) or (
        operator == "**" and (len(numbers) < 2 or abs(left) > 1 << 16 or abs(right) > 64)
    ):
        raise TemplateLimitError("the chat template makes a number that is too large")
    if operator == "%" and isinstance(left, str):
        check_format(left, [right])
    if operator == "*" and len(numbers) < 2:
        left_size, right_size = (len(side) if isinstance(side, SIZED) else abs(side) for side in (left, right))
        check_size(left_size * right_size)
