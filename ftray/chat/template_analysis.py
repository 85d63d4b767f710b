"""Does a chat template only copy what the turns say? Then one rendering serves every conversation of the same roles.

A template is a program: it may look into a text (split off thoughts, ask whether it begins with something) and write
something else. This file reads the program, without running it, and says yes only where that is impossible. Knows
jinja's syntax trees; no tokenizer, no conversation. Whoever gets a no renders each conversation by itself.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import nodes

LOOP_FIELDS = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}
SAME_FOR_ANY_STRING = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence"}
ROUNDS = 8  # passes until what the names hold no longer changes


class _Kind(IntEnum):
    """What an expression may hold, from harmless to delicate."""

    OTHER = 0  # nothing of a turn's text
    TEXT = 1  # a turn's text itself
    COMPOSED = 2  # something with a turn's text in it
    TURNS = 3  # a turn, or a list of turns


class _LooksInside(Exception):
    """The template does, or might do, more with a text than to copy it."""


@lru_cache(maxsize=8)
def only_copies(template: str) -> bool:
    """Whether what the template writes is fixed by the turns' roles and by which texts are empty, but for the texts
    themselves, copied whole or trimmed. False where that can't be seen."""
    try:
        tree = _parse(template)
        reading = _Reading()
        for _ in range(ROUNDS):
            known = dict(reading.names)
            reading.statements(tree.body)
            if reading.names == known:
                return True
    except _LooksInside:
        pass
    return False


def _parse(template: str) -> nodes.Template:
    from jinja2 import Environment, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        """`{% generation %}` of transformers: marks what the assistant says, writes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja has it

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        return Environment(extensions=[Generation, loopcontrols]).parse(template)  # nosec B701 # parsed, not rendered; templates make chat text, not HTML
    except (TemplateError, RecursionError) as err:
        raise _LooksInside from err


class _Reading:
    """One pass over a template's statements. names: what each name may hold, over all places that set it."""

    def __init__(self) -> None:
        self.names: dict[str, _Kind] = {"messages": _Kind.TURNS}

    def statements(self, body: list[nodes.Node]) -> None:
        for node in body:
            self._statement(node)

    def _statement(self, node: nodes.Node) -> None:
        from jinja2 import nodes

        if isinstance(node, nodes.Output):
            for part in node.nodes:
                self._expect(part, _Kind.OTHER, _Kind.TEXT, _Kind.COMPOSED)
        elif isinstance(node, nodes.If):
            if self._asks_for_a_string(node.test):
                self.statements(node.body)  # the other branches are for contents that ftray has none of
                return
            self._condition(node.test)
            for branch in (node.body, node.elif_, node.else_):
                self.statements(list(branch))
        elif isinstance(node, nodes.For) and not node.recursive:
            held = self._expect(node.iter, _Kind.OTHER, _Kind.TURNS)
            for name in (
                [node.target] if isinstance(node.target, nodes.Name) else list(node.target.find_all(nodes.Name))
            ):
                self._set(name.name, held)
            if node.test is not None:
                self._condition(node.test)
            self.statements(node.body)
            self.statements(node.else_)
        elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            self._set(node.target.name, self._kind(node.node))
        elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.NSRef):
            self._expect(node.node, _Kind.OTHER)
        elif not isinstance(node, nodes.Break | nodes.Continue):
            raise _LooksInside

    def _set(self, name: str, kind: _Kind) -> None:
        known = self.names.get(name, kind)
        if name == "loop" or (_Kind.TURNS in (known, kind) and {known, kind} & {_Kind.TEXT, _Kind.COMPOSED}):
            raise _LooksInside
        self.names[name] = max(known, kind)
        if {known, kind} == {_Kind.OTHER, _Kind.TEXT}:
            self.names[name] = _Kind.COMPOSED  # no longer a turn's text for sure

    def _expect(self, node: nodes.Node, *allowed: _Kind) -> _Kind:
        kind = self._kind(node)
        if kind not in allowed:
            raise _LooksInside
        return kind

    def _condition(self, node: nodes.Node) -> None:
        """A test may ask whether a turn's text is empty: renderings are kept apart by that."""
        from jinja2 import nodes

        if isinstance(node, nodes.And | nodes.Or):
            self._condition(node.left)
            self._condition(node.right)
        elif isinstance(node, nodes.Not):
            self._condition(node.node)
        else:
            self._expect(node, _Kind.OTHER, _Kind.TEXT)

    def _asks_for_a_string(self, test: nodes.Node) -> bool:
        from jinja2 import nodes

        return isinstance(test, nodes.Test) and test.name == "string" and self._kind(test.node) == _Kind.TEXT

    def _kind(self, node: nodes.Node) -> _Kind:
        from jinja2 import nodes

        if isinstance(node, nodes.TemplateData | nodes.Const):
            return _Kind.OTHER
        if isinstance(node, nodes.Name):
            if node.name == "loop":
                raise _LooksInside  # `loop` is only known by its harmless fields
            return self.names.get(node.name, _Kind.OTHER)
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            return self._kind_of_part(node)
        if isinstance(node, nodes.Add | nodes.Concat):
            parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
            kinds = [self._expect(p, _Kind.OTHER, _Kind.TEXT, _Kind.COMPOSED) for p in parts]
            return _Kind.COMPOSED if any(kinds) else _Kind.OTHER
        if isinstance(node, nodes.CondExpr):
            return self._kind_of_choice(node)
        if isinstance(node, nodes.Filter) and node.node is not None:
            return self._kind_of_filter(node)
        if isinstance(node, nodes.Test):
            kind = self._kind(node.node)
            if kind != _Kind.OTHER and node.name not in SAME_FOR_ANY_STRING:
                raise _LooksInside
        elif isinstance(node, nodes.Call):
            return self._kind_of_call(node)
        elif isinstance(node, nodes.Compare):
            self._compare(node)
            return _Kind.OTHER
        elif isinstance(node, nodes.And | nodes.Or | nodes.Not):
            self._condition(node)
            if isinstance(node, nodes.And | nodes.Or):  # they give one of their sides, which may be a text
                self._expect(node.left, _Kind.OTHER)
                self._expect(node.right, _Kind.OTHER)
            return _Kind.OTHER
        elif not isinstance(
            node, nodes.List | nodes.Tuple | nodes.Dict | nodes.Pair | nodes.Operand | nodes.Slice
        ) and (not isinstance(node, nodes.BinExpr | nodes.UnaryExpr)):
            raise _LooksInside
        for child in node.iter_child_nodes():
            if not isinstance(node, nodes.Test) or child is not node.node:
                self._expect(child, _Kind.OTHER)
        return _Kind.OTHER

    def _kind_of_part(self, node: nodes.Getattr | nodes.Getitem) -> _Kind:
        from jinja2 import nodes

        key: object = node.attr if isinstance(node, nodes.Getattr) else None
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            if key in LOOP_FIELDS:
                return _Kind.OTHER
            raise _LooksInside
        held = self._kind(node.node)
        if isinstance(node, nodes.Getitem):
            self._expect(node.arg, _Kind.OTHER)
            key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if held == _Kind.OTHER:
            return held
        if held != _Kind.TURNS:
            raise _LooksInside  # a piece of a text
        if isinstance(key, str):
            if isinstance(node, nodes.Getattr) and (hasattr(dict, key) or hasattr(list, key)):
                raise _LooksInside
            return _Kind.TEXT if key == "content" else _Kind.OTHER
        return _Kind.TURNS

    def _kind_of_choice(self, node: nodes.CondExpr) -> _Kind:
        if self._asks_for_a_string(node.test):
            return self._kind(node.expr1)
        self._condition(node.test)
        kinds = {self._kind(node.expr1), self._kind(node.expr2) if node.expr2 is not None else _Kind.OTHER}
        if len(kinds) == 1:
            return kinds.pop()
        if _Kind.TURNS in kinds:
            raise _LooksInside
        return _Kind.COMPOSED

    def _kind_of_filter(self, node: nodes.Filter) -> _Kind:
        assert node.node is not None
        kind = self._kind(node.node)
        for argument in (*node.args, *(pair.value for pair in node.kwargs)):
            self._expect(argument, _Kind.OTHER)
        bare = not node.args and not node.kwargs and node.dyn_args is None and node.dyn_kwargs is None
        if kind == _Kind.OTHER and node.dyn_args is None and node.dyn_kwargs is None:
            return kind
        if bare and kind in (_Kind.TEXT, _Kind.COMPOSED) and node.name == "trim":
            return _Kind.COMPOSED
        if bare and kind == _Kind.TURNS and node.name in ("length", "count"):
            return _Kind.OTHER
        raise _LooksInside

    def _kind_of_call(self, node: nodes.Call) -> _Kind:
        from jinja2 import nodes

        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _LooksInside
        for argument in (*node.args, *(pair.value for pair in node.kwargs)):
            self._expect(argument, _Kind.OTHER)
        if isinstance(node.node, nodes.Name):
            if node.node.name in ("raise_exception", "namespace", "range") and node.node.name not in self.names:
                return _Kind.OTHER
            raise _LooksInside  # the date, a macro, …
        if not isinstance(node.node, nodes.Getattr):
            raise _LooksInside
        held, method = self._kind(node.node.node), node.node.attr
        if held == _Kind.TURNS and method == "get" and node.args and isinstance(node.args[0], nodes.Const):
            return _Kind.TEXT if node.args[0].value == "content" else _Kind.OTHER
        if held in (_Kind.TEXT, _Kind.COMPOSED) and method == "strip" and not node.args:
            return _Kind.COMPOSED
        if held == _Kind.OTHER:
            return held
        raise _LooksInside

    def _compare(self, node: nodes.Compare) -> None:
        from jinja2 import nodes

        self._expect(node.expr, _Kind.OTHER)
        for operand in node.ops:
            if operand.op in ("in", "notin") and isinstance(node.expr, nodes.Const):
                self._expect(operand.expr, _Kind.OTHER, _Kind.TURNS)  # `'tool_calls' in message`
            else:
                self._expect(operand.expr, _Kind.OTHER)
