"""Runs chat templates as transformers does, within bounds: a template is a program that came with a model.

The dialect is transformers' (Jinja2's immutable sandbox, `tojson`, `raise_exception`, loop controls,
`{% generation %}`), with three differences. Only the filters, tests, functions and methods that public templates use
are there; each has bounded operands. All work is counted, and above a budget the rendering is an error: counted and
not timed, so that a conversation is refused everywhere or nowhere. And `strftime_now` gives a fixed day, because a
template that writes today's date would give other tokens tomorrow. `trial` adds a process with a deadline and a memory
limit, in which a template is rendered first. Knows Jinja2; no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, cast

from ftray.template_budget import (
    CHARS_A_STEP,
    ITEMS_A_STEP,
    SIZED,
    Meter,
    TemplateLimitError,
    bounded,
    check_format,
    check_operands,
    check_operator,
    current,
    prepared,
    sized,
    spend,
    weighed,
)

TODAY = datetime(2024, 7, 26, tzinfo=UTC)  # the default date of Llama 3's templates
BUDGET = 1_000_000  # steps of one rendering; each character of the conversation adds CHARS_BUDGET
CHARS_BUDGET = 2
MAX_SOURCE_CHARS = 1 << 16  # the longest public templates have about 30,000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words(
    "abs capitalize count d default dictsort e escape first float format indent int items join last length list lower map "
    "max min reject rejectattr replace reverse safe select selectattr sort string title tojson trim unique upper"
)
TESTS = _words(
    "!= < <= == > >= boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer "
    "iterable le lessthan lower lt mapping ne none number odd sameas sequence string true undefined upper"
)
GLOBALS = _words("dict namespace range")
METHODS = {
    str: _words(
        "capitalize count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace "
        "istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip "
        "split splitlines startswith strip swapcase title upper"
    ),
    dict: _words("get items keys values"),
    list: _words("count index"),
    tuple: _words("count index"),
}
LOOP_FIELDS = _words("changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. marks: (start, end) in characters of the `{% generation %}` blocks."""

    text: str
    marks: list[tuple[int, int]]


class Template:
    """A compiled chat template.

    Raises:
        jinja2.TemplateError: It is not well-formed, or uses a filter or test that is not there.
        TemplateLimitError: It is too long.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateLimitError(f"the chat template is longer than {MAX_SOURCE_CHARS} characters")
        self._template = _environment().from_string(source)
        self.has_marks = re.search(r"{%-?\s*generation\s*-?%}", source) is not None

    def render(self, turns: Sequence[dict[str, Any]], add_generation_prompt: bool, **names: Any) -> Rendered:
        """Renders a conversation.

        Args:
            turns: The messages.
            add_generation_prompt: Whether the text ends where the next answer begins.
            names: Special tokens by their names.

        Raises:
            jinja2.TemplateError: The template refuses the conversation or does what it may not.
            TemplateLimitError: It takes more steps than the budget, or makes too long a text.
            RecursionError: Its macros call each other too deeply.
        """
        meter = Meter(BUDGET + CHARS_BUDGET * sum(len(turn["content"]) for turn in turns))
        token = current.set(meter)
        try:
            for piece in self._template.generate(
                messages=list(turns), tools=None, documents=None, add_generation_prompt=add_generation_prompt, **names
            ):
                meter.write(piece)
        finally:
            current.reset(token)
        return Rendered("".join(meter.written), meter.marks)


@lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """The template of a source text; compiled once a process."""
    return Template(source)


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Marks(Extension):
        """`{% generation %}`: marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's interface

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            text = str(caller())
            meter = current.get()
            meter.marks.append((meter.num_written, meter.num_written + len(text)))
            return text

    class Counting(ImmutableSandboxedEnvironment):
        """Transformers' sandbox with allow-lists, whose work is counted."""

        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            _add_counting(tree)
            return tree

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ARG002 - Jinja's interface
            if isinstance(obj, LoopContext):
                return attr in LOOP_FIELDS
            if isinstance(obj, Namespace):
                return not attr.startswith("_")
            return any(isinstance(obj, kind) and attr in names for kind, names in METHODS.items())

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"templates may not use {attribute!r} of a {type(obj).__name__}")

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            name = getattr(function, "__name__", "")
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # str.format is wrapped
            for value in (*([owner] if isinstance(owner, SIZED) else ()), *args, *kwargs.values()):
                weighed(value)
            args = prepared(name if isinstance(owner, SIZED) else "", args)
            operands = [owner, *args] if isinstance(owner, SIZED) else list(args)
            check_operands(name, operands, kwargs)
            return sized(super().call(context, function, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operator(operator, left, right)
            return sized(super().call_binop(context, operator, left, right))

    class PlainNamespace(Namespace):
        """Jinja's `namespace`, which doesn't write out what it holds."""

        def __repr__(self) -> str:
            return "<namespace>"

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        check_format(format)
        return TODAY.strftime(format)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = Counting(trim_blocks=True, lstrip_blocks=True, extensions=[Marks, loopcontrols])
    made.filters["tojson"] = tojson
    made.filters = {name: bounded(function, name) for name, function in made.filters.items() if name in FILTERS}
    made.filters |= {"_spend": spend, "_sized": sized, "_weighed": weighed}
    made.tests = {
        name: bounded(cast("Callable[..., Any]", function), name)
        for name, function in made.tests.items()
        if name in TESTS
    }
    made.globals = {name: value for name, value in made.globals.items() if name in GLOBALS}
    made.globals["namespace"] = PlainNamespace
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    made.finalize = weighed
    return made


def _add_counting(tree: Any) -> None:
    """Makes a syntax tree count what Jinja compiles to plain Python: loops, macros, comparisons, `~` and slices."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def filtered(node: Any, name: str, *args: Any) -> Any:
        return nodes.Filter(node, name, [nodes.Const(a) for a in args], [], None, None, lineno=node.lineno)

    def steps_of(node: Any) -> int:
        size = sum(1 for _ in node.find_all(nodes.Node))
        return 1 + size // ITEMS_A_STEP + sum(len(d.data) for d in node.find_all(nodes.TemplateData)) // CHARS_A_STEP

    class Transformer(NodeTransformer):
        def visit_For(self, node: Any) -> Any:  # noqa: N802
            if node.test is not None:
                node.test = filtered(node.test, "_spend", steps_of(node.test))
            return self.visit_Macro(node)

        def visit_Macro(self, node: Any) -> Any:  # noqa: N802
            steps = steps_of(node)
            self.generic_visit(node)
            nothing = nodes.Const(None, lineno=node.lineno)
            spent = filtered(nothing, "_spend", steps)
            node.body.insert(0, nodes.ExprStmt(spent, lineno=node.lineno))
            return node

        visit_CallBlock = visit_Block = visit_Macro  # noqa: N815

        def visit_Pair(self, node: Any) -> Any:  # noqa: N802 - Python hashes keys anew each time, with all that is in them
            self.generic_visit(node)
            node.key = filtered(node.key, "_weighed")
            return node

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            node.nodes = [filtered(part, "_weighed") for part in node.nodes]
            return node

        def visit_Compare(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            node.expr = filtered(node.expr, "_weighed")
            for operand in node.ops:
                operand.expr = filtered(operand.expr, "_weighed")
            return node

        def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                return filtered(node, "_sized") if node.ctx == "load" else node
            if not isinstance(node.arg, nodes.Const):
                node.arg = filtered(node.arg, "_weighed")
            return node

    Transformer().visit(tree)
