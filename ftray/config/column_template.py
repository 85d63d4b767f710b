r"""The values of `data.train[].columns`: the name of a column, or a template that joins columns.

In a template, `{name}` is the text of a column. A part in square brackets is left out if a column in it is empty or absent:

    "{instruction}[\n\nContext: {context}]"

Write `{{`, `}}`, `[[` and `]]` for the characters themselves. A value without braces and brackets is the name of a column.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{([^{}\[\]]+)\}|[{}\[\]]|[^{}\[\]]+")
LITERAL = {"{{": "{", "}}": "}", "[[": "[", "]]": "]"}


@dataclass(frozen=True)
class TemplatePart:
    """A stretch of a template: texts and columns (is_column, text) that appear together or, if it is optional, not at all."""

    pieces: tuple[tuple[bool, str], ...]
    is_optional: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in it."""
        return tuple(text for is_column, text in self.pieces if is_column)


@dataclass(frozen=True)
class ColumnTemplate:
    """A parsed value of `columns`. is_name: it is just the name of a column."""

    parts: tuple[TemplatePart, ...]
    is_name: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns in it."""
        return tuple(column for part in self.parts for column in part.columns)

    def fill(self, required: Callable[[str], str], optional: Callable[[str], str]) -> str:
        """The text of a record.

        Args:
            required: The text of a column outside brackets.
            optional: The text of a column in brackets, empty if the record has none.
        """
        texts = []
        for part in self.parts:
            values = {name: (optional if part.is_optional else required)(name) for name in part.columns}
            if not part.is_optional or all(value.strip() for value in values.values()):
                texts += [values[text] if is_column else text for is_column, text in part.pieces]
        return "".join(texts)


@lru_cache(maxsize=256)
def parse_template(text: str) -> ColumnTemplate:
    """Parses a value of `columns`.

    Raises:
        ValueError: The braces or brackets do not match, or a template or its brackets name no column.
    """
    if not any(c in text for c in "{}[]"):
        return ColumnTemplate((TemplatePart(((True, text),), False),), is_name=True)
    parts: list[TemplatePart] = []
    pieces: list[tuple[bool, str]] = []
    is_optional = False
    for match in TOKEN.finditer(text):
        token = match[0]
        if match[1] is not None or token in LITERAL or token not in "{}[]":
            pieces.append((True, match[1].strip()) if match[1] is not None else (False, LITERAL.get(token, token)))
            continue
        if token in "{}" or (token == "[") == is_optional:
            raise ValueError(
                f"{text!r} has a {token} without its counterpart; write {token * 2} for the character itself"
            )
        _close(parts, pieces, is_optional, text)
        pieces, is_optional = [], token == "["
    if is_optional:
        raise ValueError(f"{text!r} has a [ without its counterpart; write [[ for the character itself")
    _close(parts, pieces, False, text)
    template = ColumnTemplate(tuple(parts), is_name=False)
    if not template.columns:
        raise ValueError(f"{text!r} names no column; write {{name}} for the text of a column")
    return template


def _close(parts: list[TemplatePart], pieces: list[tuple[bool, str]], is_optional: bool, text: str) -> None:
    part = TemplatePart(tuple(pieces), is_optional)
    if is_optional and not part.columns:
        raise ValueError(
            f"{text!r} has brackets without a column in them; write [[ and ]] for the characters themselves"
        )
    if pieces:
        parts.append(part)
