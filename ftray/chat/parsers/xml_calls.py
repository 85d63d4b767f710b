"""Calls with a tag per argument: Qwen 3.5 and Qwen 3 Coder, GLM 4.5 and later.

Texts stand in the tags as they are, other values as JSON. Which one a value is follows from the tool's schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftray.chat.parsers.answer import AnswerOutput
from ftray.chat.parsers.json_calls import compact
from ftray.chat.parsers.reader import Reading, TextReader

PYTHON = {"True": True, "False": False, "None": None}  # some templates write Python's words


@dataclass(frozen=True)
class XmlCalls:
    """A call between tags, with tags around each argument.

    Attributes:
        name: The family.
        head: Tags before the call's name.
        head_end: After the name.
        key: Before and after an argument's name.
        value: Before and after an argument's value.
        foot: Tags after the last argument.
        on_own_lines: Whether line breaks around a value do not belong to it.

    Source: Qwen 3 Coder and 3.5: `<tool_call><function=f><parameter=k>v</parameter></function></tool_call>`, with line breaks.
    GLM 4.5 to 4.7: `<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>`, with line breaks in some versions.
    """

    name: str
    head: tuple[str, ...]
    head_end: str
    key: tuple[str, str]
    value: tuple[str, str]
    foot: tuple[str, ...]
    on_own_lines: bool = False
    is_bare: bool = False

    @property
    def begins(self) -> tuple[str, ...]:
        return (self.head[0],)

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(text for text in (*self.head, *self.key, *self.value, *self.foot) if len(text) > 1)

    def read(self, reader: TextReader, out: AnswerOutput) -> Reading[bool]:
        for part in self.head[1:]:
            yield from reader.blanks()
            if not (yield from reader.take(part)):
                return False
        yield from reader.blanks()
        name = yield from self._read_name(reader)
        if not name or not (yield from reader.take(self.head_end)):
            return False
        out.begin_call(name)
        out.arguments("{")
        schema, before = out.tools.get(name, {}), ""
        while True:
            yield from reader.blanks()
            if not (yield from reader.take(self.key[0])):
                break
            if not (yield from self._read_argument(reader, out, schema, before)):
                return False
            before = ", "
        for part in self.foot:
            yield from reader.blanks()
            yield from reader.take(part)
        out.arguments("}")
        return True

    @staticmethod
    def _read_name(reader: TextReader) -> Reading[str]:
        """The name, up to a line break or a tag, which stays unread."""
        name = ""
        while (first := (yield from reader.peek())) and not (first.isspace() or first in '<>{"'):
            yield from reader.take(first)
            name += first
        return name

    def _read_argument(
        self, reader: TextReader, out: AnswerOutput, schema: Mapping[str, Any], before: str
    ) -> Reading[bool]:
        """Writes `"key": value`, a text piece by piece. The opening tag of the key has been read."""
        key: list[str] = []
        if (yield from reader.until((self.key[1],), key.append)) is None:
            return False
        if self.value[0]:
            yield from reader.blanks()
            if not (yield from reader.take(self.value[0])):
                return False
        ends: tuple[str, ...] = (self.value[1],)
        if self.on_own_lines:
            yield from reader.take("\n")
            ends = ("\n" + self.value[1], *ends)
        name = "".join(key).strip()
        properties = schema.get("properties")
        kind = properties.get(name) if isinstance(properties, Mapping) else None
        out.arguments(before + compact(name) + ": ")
        if is_text(kind):
            out.arguments('"')
            end = yield from reader.until(ends, lambda text: out.arguments(compact(text)[1:-1]))
            out.arguments('"')
        else:
            parts: list[str] = []
            end = yield from reader.until(ends, parts.append)
            out.arguments(compact(typed_value("".join(parts), kind)))
        return end is not None


def types_of(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows; empty if it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    kinds = schema.get("type")
    names = (
        {kinds}
        if isinstance(kinds, str)
        else {k for k in kinds if isinstance(k, str)}
        if isinstance(kinds, list)
        else set()
    )
    for part in (*_list(schema, "anyOf"), *_list(schema, "oneOf")):
        names |= types_of(part)
    if not names:
        names = {
            "string" if isinstance(value, str) else "null" if value is None else "other"
            for value in _list(schema, "enum")
        }
    return frozenset(names)


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def is_text(schema: Any) -> bool:
    """Whether a schema allows nothing but texts, so that a value can be passed on before its end."""
    return types_of(schema) == {"string"}


def typed_value(text: str, schema: Any) -> Any:
    """The value that a text stands for, by its schema. Without one, JSON that is no string, or else the text."""
    kinds = types_of(schema)
    if "string" in kinds and not ("null" in kinds and text in ("null", "None")):
        return text
    if text in PYTHON:
        return PYTHON[text]
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) and not kinds else value
