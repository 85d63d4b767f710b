"""Renders chat templates, which are programs that come with a model, as transformers does and within limits.

The dialect is that of transformers: Jinja2's ImmutableSandboxedEnvironment with `tojson`, `raise_exception`, loop controls
and `{% generation %}`. Three things differ. Only the filters, tests, methods and globals that public templates use exist,
with bounded operands. Work is counted, and a rendering that exceeds its budget is an error; counting instead of timing
gives the same answer on every machine. `strftime_now` returns a fixed day, because today's date would give other tokens
tomorrow. `template_trial` adds a process with a deadline and a memory limit for a template's first rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ftray.chat.template_limits import (
    CHARS_PER_STEP,
    ITEMS_PER_STEP,
    MARK,
    SIZED,
    RenderState,
    TemplateLimitError,
    bounded,
    charge,
    charge_size,
    charge_tree,
    check_format,
    check_operator,
    count_chars,
    current,
    prepare_call,
)

TODAY = datetime(2024, 7, 26, tzinfo=UTC)  # the default date of Llama 3's templates
BUDGET = 1_000_000  # steps of one rendering, to which each character of the conversation adds STEPS_PER_CHAR
STEPS_PER_CHAR = 2
MAX_SOURCE_CHARS = 1 << 16  # the longest public templates have about 30,000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class InspectedError(Exception):
    """A template does more with a message's text than copying it."""


class Placeholder:
    """Stands for a message's text in a probe rendering, which shows whether the template only copies texts.

    It can be written, joined to other text and stripped; whether it is empty is known. Every other use raises
    InspectedError, so a rendering that succeeds would have taken the same steps with any other non-empty texts.

    Args:
        text: The characters that stand for the text, with MARK among them.
        is_whole: Whether this is one text, neither stripped nor joined.
    """

    def __init__(self, text: str, is_whole: bool = True) -> None:
        self.text, self.is_whole = text, is_whole

    def strip(self) -> Placeholder:
        return Placeholder(self.text.strip(), is_whole=False)

    def __bool__(self) -> bool:
        return self.is_whole or self._refuse()

    def __add__(self, other: object) -> Placeholder:
        if isinstance(other, str | Placeholder):
            return Placeholder(self.text + _written(other), is_whole=False)
        raise InspectedError

    def __radd__(self, other: object) -> Placeholder:
        if isinstance(other, str):
            return Placeholder(other + self.text, is_whole=False)
        raise InspectedError

    def _refuse(self, *_: object) -> Any:
        raise InspectedError

    __str__ = __repr__ = __format__ = __hash__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __iter__ = __len__ = __contains__ = __getitem__ = __int__ = __float__ = __index__ = _refuse


FILTERS = _words(
    "abs capitalize count d default dictsort e escape first float format indent int items join last length list lower map "
    "max min reject rejectattr replace reverse safe select selectattr sort string title tojson trim unique upper"
)
TESTS = _words(
    "!= < <= == > >= boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer "
    "iterable le lessthan lower lt mapping ne none number odd sameas sequence string true undefined upper"
)
GLOBALS = _words("dict namespace range")
ALWAYS_SET = _words("add_generation_prompt documents messages tools")  # by `Template.render`
METHODS = {
    str: _words(
        "capitalize count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace "
        "istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip "
        "split splitlines startswith strip swapcase title upper"
    ),
    dict: _words("get items keys values"),
    list: _words("count index"),
    tuple: _words("count index"),
    Placeholder: _words("strip"),
    LoopContext: _words(
        "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
    ),
}
# Filters and tests that give the same answer for every non-empty text.
PLACEHOLDER_FILTERS: dict[str, Callable[[Placeholder], Any]] = {"trim": Placeholder.strip}
PLACEHOLDER_TESTS: dict[str, Callable[[Placeholder], Any]] = {
    **dict.fromkeys(["defined", "iterable", "sequence", "string"], lambda _: True),
    **dict.fromkeys(["mapping", "none", "undefined"], lambda _: False),
}


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. marks: (start, end) of each `{% generation %}` block, in characters."""

    text: str
    marks: list[tuple[int, int]]


class Template:
    """A compiled chat template.

    Raises:
        jinja2.TemplateError: It is not well-formed, or uses a filter or test that does not exist here.
        TemplateLimitError: It is too long.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateLimitError(f"the chat template is longer than {MAX_SOURCE_CHARS} characters")
        environment = _environment()
        tree = environment.parse(source)
        self.variables = frozenset(find_undeclared_variables(tree)) - ALWAYS_SET - environment.globals.keys()
        self._template = environment.from_string(_AddCharges().visit(tree))
        self.has_marks = re.search(r"{%-?\s*generation\s*-?%}", source) is not None

    def render(
        self,
        turns: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
        **names: Any,
    ) -> Rendered:
        """Renders a conversation.

        Args:
            turns: The messages. Their contents are texts, or Placeholders in a probe.
            add_generation_prompt: Whether the text ends where the next answer begins.
            tools: The tools that the assistant may call.
            names: Special tokens by their names.

        Raises:
            jinja2.TemplateError: The template refuses the conversation, or uses something that is not allowed.
            TemplateLimitError: It exceeds the budget, or makes too long a text.
            RecursionError: Its macros call each other too deeply.
            InspectedError: It does more with a Placeholder than copying it.
        """
        is_probe = any(isinstance(turn.get("content"), Placeholder) for turn in turns)
        state = RenderState(BUDGET + STEPS_PER_CHAR * count_chars([*turns, *tools]), is_probe)
        token = current.set(state)
        try:
            for piece in self._template.generate(
                messages=list(turns),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **names,
            ):
                state.write(piece)
        finally:
            current.reset(token)
        return Rendered("".join(state.pieces), state.marks)


@lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """The compiled template of a source text, cached per process."""
    return Template(source)


def _written(value: Any) -> Any:
    """A value as it is written: a placeholder's text, anything else as it is, charged."""
    return value.text if isinstance(value, Placeholder) else charge_tree(value)


def _join(parts: Sequence[Any]) -> Any:
    """The `~` operator."""
    text = "".join([str(_written(part)) for part in parts])
    return Placeholder(text, is_whole=False) if any(isinstance(p, Placeholder) for p in parts) else text


class _Marks(Extension):
    """`{% generation %}`: marks the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], Any]) -> str:
        text = str(_written(caller()))
        state = current.get()
        state.marks.append((state.num_chars, state.num_chars + len(text)))
        return text


class _Sandbox(ImmutableSandboxedEnvironment):
    """Transformers' sandbox with allow-lists and charged work."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ARG002 - Jinja's interface
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in METHODS.items())

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"templates may not use {attribute!r} of a {type(obj).__name__}")

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        owner = owner if isinstance(owner, SIZED) else None
        args = tuple(prepare_call(getattr(function, "__name__", ""), args, kwargs, owner))
        return charge_size(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return charge_size(super().call_binop(context, operator, left, right))

    @staticmethod
    def concat(pieces: Any) -> Any:
        """Joins the text that a macro or a `{% set %}` block captures."""
        text = "".join(pieces)
        return Placeholder(text, is_whole=False) if current.get().is_probe and MARK in text else text


class _PlainNamespace(Namespace):
    """Jinja's `namespace`, whose text does not show its contents."""

    def __repr__(self) -> str:
        return "<namespace>"


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    check_format(format)
    return TODAY.strftime(format)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _allowed(functions: Any, names: frozenset[str], answers: dict[str, Callable[[Placeholder], Any]]) -> dict[str, Any]:
    """The filters or tests of these names, bounded. Only those with an answer for placeholders take one."""

    def guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        plain = bounded(function, name)

        @wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(value, Placeholder) for value in (*args, *kwargs.values())):
                return plain(*args, **kwargs)
            if name not in answers or len(args) != 1 or kwargs:
                raise InspectedError
            return answers[name](args[0])

        return call

    return {name: guarded(function, name) for name, function in functions.items() if name in names}


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, loopcontrols])
    env.filters = _allowed(env.filters | {"tojson": _tojson}, FILTERS, PLACEHOLDER_FILTERS)
    env.filters |= {"_charge": charge, "_charge_size": charge_size, "_charge_tree": charge_tree, "_join": _join}
    env.tests = _allowed(env.tests, TESTS, PLACEHOLDER_TESTS)
    env.globals = {name: value for name, value in env.globals.items() if name in GLOBALS}
    env.globals |= {"namespace": _PlainNamespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
    env.finalize = _written
    return env


def _filtered(node: Any, name: str, *args: Any) -> Any:
    return nodes.Filter(node, name, [nodes.Const(a) for a in args], [], None, None, lineno=node.lineno)


def _num_steps(node: Any) -> int:
    size = sum(1 for _ in node.find_all(nodes.Node))
    return 1 + size // ITEMS_PER_STEP + sum(len(d.data) for d in node.find_all(nodes.TemplateData)) // CHARS_PER_STEP


class _AddCharges(NodeTransformer):
    """Adds charges to the nodes that Jinja compiles to plain Python: loops, macros, comparisons, `~`, keys and slices."""

    def visit_For(self, node: Any) -> Any:  # noqa: N802
        if node.test is not None:
            node.test = _filtered(node.test, "_charge", _num_steps(node.test))
        return self.visit_Macro(node)

    def visit_Macro(self, node: Any) -> Any:  # noqa: N802
        steps = _num_steps(node)
        self.generic_visit(node)
        charged = _filtered(nodes.Const(None, lineno=node.lineno), "_charge", steps)
        node.body.insert(0, nodes.ExprStmt(charged, lineno=node.lineno))
        return node

    visit_CallBlock = visit_Block = visit_Macro  # noqa: N815

    def visit_Pair(self, node: Any) -> Any:  # noqa: N802 - Python hashes a key again each time, with everything inside it
        self.generic_visit(node)
        node.key = _filtered(node.key, "_charge_tree")
        return node

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_join")

    def visit_Compare(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        for part in (node, *node.ops):
            part.expr = _filtered(part.expr, "_charge_tree")
        return node

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(node, "_charge_size") if node.ctx == "load" else node
        if not isinstance(node.arg, nodes.Const):
            node.arg = _filtered(node.arg, "_charge_tree")
        return node
