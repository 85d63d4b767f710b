"""Runs chat templates as transformers does, and never for long: a template is a program that came with a model.

The same dialect as transformers' (sandbox, `tojson`, `raise_exception`, loop controls, `{% generation %}`), with two
differences. What a rendering does is counted (rounds of loops, calls, characters made), and above a budget it ends as
an error: counted and not timed, so that a conversation is refused everywhere or nowhere. And `strftime_now` gives a
fixed day, because a template that writes today's date would give other tokens tomorrow. Knows jinja; no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, wraps
from typing import Any

TODAY = datetime(2024, 7, 26, tzinfo=UTC)  # the day that Llama 3's templates take where they know none
BUDGET = 1_000_000  # steps of one rendering, and for each character of the conversation CHARS_BUDGET more
CHARS_BUDGET = 2
CHARS_A_STEP = 64
MAX_CHARS = 1 << 26  # of any text on the way
SIZED = (str, bytes, list, tuple, dict, range)
WIDE = re.compile(r"\d{5,}|\*")


class TooMuch(Exception):
    """A template that does more than rendering a conversation can need."""


@dataclass
class _Meter:
    """One rendering: what it may still do, and the places of its generation marks."""

    left: int
    marks: list[tuple[int, int]] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def take(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise TooMuch("the chat template does too much work for this conversation; it may not end")


_meter: ContextVar[_Meter] = ContextVar("meter")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. marks: where it lies in `{% generation %}` blocks: (start, end) in characters."""

    text: str
    marks: list[tuple[int, int]]


class Template:
    """A compiled chat template. Raises what jinja raises for one that isn't well-formed."""

    def __init__(self, source: str) -> None:
        self._template = _environment().from_string(source)
        self.has_marks = re.search(r"{%-?\s*generation\s*-?%}", source) is not None

    def render(self, turns: Sequence[dict[str, str]], add_generation_prompt: bool, **names: Any) -> Rendered:
        """Renders a conversation. names: special tokens by their names. Raises jinja's errors, TooMuch, RecursionError."""
        meter = _Meter(BUDGET + CHARS_BUDGET * sum(len(turn["content"]) for turn in turns))
        token = _meter.set(meter)
        try:
            num_chars = 0
            for piece in self._template.generate(
                messages=list(turns), tools=None, documents=None, add_generation_prompt=add_generation_prompt, **names
            ):
                num_chars += len(piece)
                if num_chars > MAX_CHARS:
                    raise TooMuch("the chat template writes too much for this conversation; it may not end")
                meter.written.append(piece)
        finally:
            _meter.reset(token)
        return Rendered("".join(meter.written), meter.marks)


@lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """The template of a source text; compiled once a process."""
    return Template(source)


def _checked(value: object) -> int:
    """Counts a value that was made, by its size; returns the size. Raises TooMuch."""
    size = len(value) if isinstance(value, SIZED) else 0
    if size > MAX_CHARS:
        raise TooMuch("the chat template makes a text that is too long; it may not end")
    _meter.get().take(1 + size // CHARS_A_STEP)
    return size


def _weighed(value: Any) -> Any:
    """The value, after all that is in it was counted: lists of lists of lists may be small and their text without end."""
    if isinstance(value, str):
        _checked(value)
        return value
    waiting = [value] if isinstance(value, list | tuple | dict) else []
    while waiting:
        inside = waiting.pop()
        for each in inside.items() if isinstance(inside, dict) else inside:
            _checked(each)
            if isinstance(each, list | tuple | dict):
                waiting.append(each)
    _checked(value)
    return value


def _rounds(values: Iterable[Any]) -> Any:
    """What a loop goes over, counted round by round."""
    return _Rounds(values) if isinstance(values, Sized) else _count_rounds(values)


def _count_rounds(values: Iterable[Any]) -> Iterator[Any]:
    meter = _meter.get()
    for value in values:
        meter.take(1)
        yield value


class _Rounds:
    """A sized iterable that counts: `loop.length` and `loop.last` need the size."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _count_rounds(self._values)


def _bounded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter whose numbers and results are bounded."""

    @wraps(function)  # keeps jinja's marks: which filters want the context
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(name, args, kwargs)
        for value in args:
            _weighed(value)
        result = function(*args, **kwargs)
        _checked(result)
        return result

    return call


def _check_arguments(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuses, before the work, what would make a giant of small things."""
    given = [*args, *kwargs.values()]
    if any(isinstance(a, int) and abs(a) > MAX_CHARS for a in given):
        raise TooMuch(f"the chat template calls {name} with a number that is too large")
    texts = [a for a in given if isinstance(a, str)]
    if name == "format" and any(WIDE.search(t) for t in texts):
        raise TooMuch("the chat template formats a text that is too wide")
    if name in ("join", "replace") and len(given) > 1:
        # at most: every place of the longest text filled with the longest of the others
        sizes = sorted((len(a) if isinstance(a, SIZED) else 1 for a in given), reverse=True)
        parts = sum(len(x) for a in given if isinstance(a, list | tuple) for x in a if isinstance(x, SIZED))
        if (sizes[0] + 1) * sizes[1] + parts > MAX_CHARS:
            raise TooMuch(f"the chat template makes a text by {name} that may be too long")


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Marks(Extension):
        """`{% generation %}`: what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - as jinja has it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            text = str(caller())
            meter = _meter.get()
            start = sum(map(len, meter.written))
            meter.marks.append((start, start + len(text)))
            return text

    class Counting(ImmutableSandboxedEnvironment):
        """Transformers' sandbox, whose work is counted."""

        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            for loop in list(tree.find_all(nodes.For)):
                loop.iter = nodes.Filter(loop.iter, "_rounds", [], [], None, None, lineno=loop.lineno)
            for concat in list(tree.find_all(nodes.Concat)):
                concat.nodes = [nodes.Filter(n, "_part", [], [], None, None, lineno=n.lineno) for n in concat.nodes]
            return tree

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            name = getattr(function, "__name__", "")
            owner = getattr(
                getattr(function, "__wrapped__", function), "__self__", None
            )  # the sandbox wraps str.format
            _check_arguments(name, [*([owner] if isinstance(owner, str) else []), *args], kwargs)
            result = super().call(context, function, *args, **kwargs)
            _checked(result)
            return result

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                result = left + right
                _checked(result)
                return result
            if operator == "*" and any(isinstance(side, SIZED) for side in (left, right)):
                _check_product(left, right)
            elif operator == "**" and (abs(left) > 1 << 16 or abs(right) > 64):
                raise TooMuch("the chat template makes a number that is too large")
            elif operator == "%" and isinstance(left, str) and WIDE.search(left):
                raise TooMuch("the chat template formats a text that is too wide")
            elif operator == "*" and max(abs(left), abs(right)) > 1 << 256:
                raise TooMuch("the chat template makes a number that is too large")
            result = super().call_binop(context, operator, left, right)
            _checked(result)
            return result

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    found = Counting(trim_blocks=True, lstrip_blocks=True, extensions=[Marks, loopcontrols])
    found.filters["tojson"] = tojson
    found.filters = {name: _bounded(function, name) for name, function in found.filters.items()}
    found.filters["_rounds"] = _rounds
    found.filters["_part"] = _weighed
    found.finalize = _weighed
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = TODAY.strftime
    return found


def _check_product(left: Any, right: Any) -> None:
    size = 1
    for side in (left, right):
        size *= len(side) if isinstance(side, SIZED) else abs(side)
    if size > MAX_CHARS:
        raise TooMuch("the chat template makes a text that is too long; it may not end")
