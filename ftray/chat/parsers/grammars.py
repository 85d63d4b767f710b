"""Grammars of constrained answers, in llguidance's variant of Lark.

An answer is optional reasoning, and then calls, content that follows a JSON schema, or free text. The texts around them are the
template's own (`shape`). A token that the tokenizer has added is written by its id, because only the token itself has it.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftray.chat.parsers.shape import AnswerShape, ArgumentTags, CallShape
from ftray.chat.parsers.xml_calls import types_of

FREE = r"/(.|\n)*/"
ANY_ID = "/[a-zA-Z0-9]{9}/"
MAX_GRAMMAR_CHARS = 1 << 17
COMPACT = (",", ":")


class GrammarWriter:
    """Writes the grammar of one answer.

    Args:
        shape: The template's texts.
        added_tokens: Tokens that the tokenizer has added, with their ids.
    """

    def __init__(self, shape: AnswerShape, added_tokens: Mapping[str, int]) -> None:
        self._shape, self._ids = shape, added_tokens
        tokens = sorted(added_tokens, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._call_ids = re.compile("|".join(map(re.escape, shape.call_ids)) or r"(?!)")
        self._rules: list[str] = []

    def schema_answer(self, schema: str, prompt: str) -> str:
        """An answer whose content follows a JSON schema. prompt: its end."""
        return self._finish(self._content(json.loads(schema)), prompt)

    def calls_answer(
        self, tools: Sequence[dict[str, Any]], prompt: str, *, is_single: bool, schema: str | None = None
    ) -> str:
        """An answer that calls at least one of the tools, or that follows the schema."""
        calls = self._literal(self._calls.begin) + " " + self._call_list(tools, is_single)
        if schema is not None:
            calls = f"({calls} | {self._content(json.loads(schema))})"
        return self._finish(calls, prompt)

    def text_or_calls_answer(self, tools: Sequence[dict[str, Any]], prompt: str, *, is_single: bool) -> str:
        """An answer of any text, in which a call, once begun, is one of the tools'."""
        begin = self._free_until(self._calls.begin.lstrip())
        calls = f"{begin} {self._call_list(tools, is_single)}"
        begin, end = self._literal(self._shape.content), self._literal(self._shape.content_end)
        return self._finish(f"({begin} {self._rule(FREE, is_terminal=True)} {end} | {calls})", prompt)

    @property
    def _calls(self) -> CallShape:
        assert self._shape.calls is not None
        return self._shape.calls

    def _finish(self, answer: str, prompt: str) -> str:
        """The grammar of an answer after its reasoning."""
        reasoning = self._shape.reasoning
        if reasoning is not None and not prompt.rstrip().endswith(reasoning.mark):
            begin = "" if _has_begun(prompt, reasoning.begin) else self._literal(reasoning.begin)
            thoughts = f"{begin} {self._free_until(reasoning.end)}"
            is_optional = not reasoning.is_always_there and begin
            answer = f"({thoughts})? {answer}" if is_optional else f"{thoughts} {answer}"
        return "%llguidance {}\n" + "\n".join([f"start: {answer}", *self._rules]) + "\n"

    def _content(self, schema: dict[str, Any]) -> str:
        return f"{self._literal(self._shape.content)} {_json(schema, COMPACT)} {self._literal(self._shape.content_end)}"

    def _call_list(self, tools: Sequence[dict[str, Any]], is_single: bool) -> str:
        """One or more calls, from the name of the first to the end of the last."""
        call = self._rule(" | ".join(self._call(tool["function"]) for tool in tools))
        more = ""
        if not is_single and self._calls.between is not None:
            more = f"({self._literal(self._calls.between)} {call})*"
        return f"{call} {more} {self._literal(self._calls.end)}"

    def _call(self, function: Mapping[str, Any]) -> str:
        schema = function.get("parameters") or {"type": "object"}
        name, shape = self._literal(function["name"]), self._calls
        if shape.tags is not None:
            return f"{name} {self._literal(shape.tags.start)} {self._arguments(schema, shape.tags)}"
        return f"{name} {self._literal(shape.middle)} {_json({'type': 'object', **schema}, shape.separators)}"

    def _arguments(self, schema: Mapping[str, Any], tags: ArgumentTags) -> str:
        properties, required = schema.get("properties"), schema.get("required")
        parts = []
        for key, kind in properties.items() if isinstance(properties, Mapping) else ():
            part = f"{self._literal(tags.key + key + tags.value)} {self._value(kind, schema, tags)}"
            parts.append(part if isinstance(required, list) and key in required else f"({part})?")
        return " ".join(parts)

    def _value(self, kind: Any, schema: Mapping[str, Any], tags: ArgumentTags) -> str:
        """A value and the text after it."""
        options = kind.get("enum") if isinstance(kind, Mapping) else None
        types = types_of(kind)
        if isinstance(options, list) and options and all(isinstance(option, str) for option in options):
            return f"({' | '.join(map(self._literal, options))}) {self._literal(tags.end)}"
        if not types or "string" in types:
            return self._free_until(tags.end)
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return f"{_json({**kind, **shared}, (', ', ': '))} {self._literal(tags.end)}"

    def _free_until(self, text: str) -> str:
        """Any text up to the first place where `text` stands, and `text`."""
        token = self._tokens.search(text)
        if token is None:
            return self._rule(f"{self._rule(FREE, is_terminal=True)} {_quote(text)}", is_lazy=True)
        before = f"{FREE} {_quote(text[: token.start()])}" if token.start() else FREE
        return f"{self._rule(before, is_terminal=True)} {self._literal(text[token.start() :])}"

    def _literal(self, text: str) -> str:
        """A fixed text, with added tokens by their ids."""
        parts, end = [], 0
        for token in self._tokens.finditer(text):
            parts += [*self._plain(text[end : token.start()]), f"<[{self._ids[token[0]]}]>"]
            end = token.end()
        return " ".join([*parts, *self._plain(text[end:])]) or '""'

    def _plain(self, text: str) -> list[str]:
        """A fixed text without added tokens, in which ids of calls stand for any id."""
        parts, end = [], 0
        for call_id in self._call_ids.finditer(text):
            parts += [_quote(text[end : call_id.start()]), ANY_ID]
            end = call_id.end()
        return [part for part in (*parts, _quote(text[end:])) if part != '""']

    def _rule(self, body: str, *, is_terminal: bool = False, is_lazy: bool = False) -> str:
        name = f"{'TEXT' if is_terminal else 'part'}_{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if is_lazy else ''}: {body}")
        return name


def _has_begun(prompt: str, begin: str) -> bool:
    return not begin.strip() or prompt.rstrip().endswith(begin.strip())


def _json(schema: Mapping[str, Any], separators: tuple[str, str]) -> str:
    """A JSON value. separators: between items, and between keys and values."""
    options = {"whitespace_flexible": False, "item_separator": separators[0], "key_separator": separators[1]}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _quote(text: str) -> str:
    return json.dumps(text)
