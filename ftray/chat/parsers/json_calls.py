"""Calls whose arguments are a JSON object: Hermes and Qwen, Granite, Nemotron, Llama 3, Mistral, DeepSeek, Kimi."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ftray.chat.parsers.answer import AnswerOutput
from ftray.chat.parsers.reader import Reading, TextReader

ARGUMENT_KEYS = ("arguments", "parameters")


class _CallObject:
    """A call under construction: it begins once both its name and the start of its arguments are known."""

    def __init__(self, out: AnswerOutput, only_known: bool) -> None:
        self._out, self._only_known = out, only_known
        self._early: list[str] = []  # arguments that came before the name
        self.name: str | None = None
        self.has_begun = self.has_arguments = False

    def begin(self) -> None:
        if self.name is not None and not self.has_begun and not (self._only_known and self.name not in self._out.tools):
            self._out.begin_call(self.name)
            self.has_begun = True
            for text in self._early:
                self._out.arguments(text)

    def arguments(self, text: str) -> None:
        self.has_arguments = True
        self.begin()
        if self.has_begun:
            self._out.arguments(text)
        else:
            self._early.append(text)


def read_call_object(reader: TextReader, out: AnswerOutput, *, only_known: bool = False) -> Reading[bool]:
    """Reads `{"name": "f", "arguments": {…}}`. `parameters` means `arguments`; the first of them counts. Other keys are skipped.

    Args:
        reader: The text.
        out: Receives the call.
        only_known: Whether objects with another name than a tool's, or without arguments, are no calls.

    Returns:
        Whether the object ended as it should.
    """
    call = _CallObject(out, only_known)
    is_whole = yield from _read_members(reader, call)
    if call.name is not None and not only_known and is_whole and not call.has_arguments:
        call.arguments("{}")
    if call.has_arguments:
        call.begin()
    return is_whole and call.has_begun


def _read_members(reader: TextReader, call: _CallObject) -> Reading[bool]:
    if not (yield from reader.take("{")):
        return False
    while True:
        yield from reader.blanks()
        if (yield from reader.take("}")):
            return True
        key = yield from reader.json_string()
        yield from reader.blanks()
        if key is None or not (yield from reader.take(":")):
            return False
        yield from reader.blanks()
        if not (yield from _read_member(reader, call, key)):
            return False
        yield from reader.blanks()
        yield from reader.take(",")


def _read_member(reader: TextReader, call: _CallObject, key: str) -> Reading[bool]:
    first = yield from reader.peek()
    if key == "name":
        call.name = yield from reader.json_string()
        return call.name is not None
    if key in ARGUMENT_KEYS and not call.has_arguments and first == "{":
        return (yield from reader.json_value(call.arguments))
    if key in ARGUMENT_KEYS and not call.has_arguments and first == '"':  # an object as JSON in a string
        text = yield from reader.json_string()
        call.arguments(text or "{}")
        return text is not None
    if key == "function" and first == "{":  # {"type": "function", "function": {…}}
        return (yield from _read_members(reader, call))
    if first and first in '{["':
        return (yield from reader.json_value(_ignore))
    return (yield from _skip_scalar(reader))


def _skip_scalar(reader: TextReader) -> Reading[bool]:
    while (first := (yield from reader.peek())).isalnum() or first in ("-", "+", "."):
        yield from reader.take(first)
    return bool(first)


def _ignore(_: str) -> None:
    return


@dataclass(frozen=True)
class TaggedJson:
    """JSON objects between tags, one object or a list.

    Source: Hermes 2 Pro, Qwen 2.5 and 3, SmolLM3, Granite 4: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`.
    Granite 3: `<|tool_call|>[{…}, {…}]`. Nemotron: `<TOOLCALL>[{…}]</TOOLCALL>`. Mistral v3: `[TOOL_CALLS] [{…}]`.
    """

    name: str
    begin: str
    end: str = ""
    is_bare: bool = False

    @property
    def begins(self) -> tuple[str, ...]:
        return (self.begin,)

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end) if self.end else (self.begin,)

    def read(self, reader: TextReader, out: AnswerOutput) -> Reading[bool]:
        yield from reader.blanks()
        is_list = yield from reader.take("[")
        while True:
            yield from reader.blanks()
            if not (yield from read_call_object(reader, out)):
                return False
            yield from reader.blanks()
            if not is_list or not (yield from reader.take(",")):
                break
        if is_list:
            yield from reader.take("]")
        if self.end:
            yield from reader.blanks()
            yield from reader.take(self.end)
        return True


@dataclass(frozen=True)
class LlamaJson:
    """`{"name": "f", "parameters": {…}}` as the whole answer, several separated by `;`, or the same after `<|python_tag|>`.

    An object is a call only if its name is a tool's. Source: the prompt format and templates of Llama 3.1, 3.2 and 3.3.
    """

    name: str = "llama3_json"
    begins: tuple[str, ...] = ("<|python_tag|>",)
    markers: tuple[str, ...] = ("<|python_tag|>",)
    is_bare: bool = True

    def read(self, reader: TextReader, out: AnswerOutput) -> Reading[bool]:
        while True:
            yield from reader.blanks()
            if not (yield from read_call_object(reader, out, only_known=True)):
                return False
            yield from reader.blanks()
            if not (yield from reader.take(";")):
                return True


@dataclass(frozen=True)
class MistralArgs:
    """`[TOOL_CALLS]f[ARGS]{…}`, repeated for each call, with `[CALL_ID]…` after the name in some versions.

    Source: mistral-common's tokenizers from version 11 on, and the templates of Mistral Small 3.2 and Magistral.
    """

    name: str = "mistral_args"
    begins: tuple[str, ...] = ("[TOOL_CALLS]",)
    markers: tuple[str, ...] = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    is_bare: bool = False

    def read(self, reader: TextReader, out: AnswerOutput) -> Reading[bool]:
        head: list[str] = []
        mark = yield from reader.until(("[ARGS]", "[CALL_ID]", "{"), head.append)
        if mark == "{" or mark is None:
            return False
        if mark == "[CALL_ID]" and (yield from reader.until(("[ARGS]",), _ignore)) is None:
            return False
        return (yield from _read_arguments(reader, out, "".join(head)))


@dataclass(frozen=True)
class SectionedJson:
    """Calls in a section, each with its name before the JSON of its arguments.

    Source: DeepSeek V3 and R1 (`function<｜tool▁sep｜>f`, then a fenced JSON block), DeepSeek V3.1 (`f<｜tool▁sep｜>{…}`), and
    Kimi K2 (`functions.f:0<|tool_call_argument_begin|>{…}`).
    """

    name: str
    section: tuple[str, str]
    call: tuple[str, str]
    separator: str
    is_bare: bool = False

    @property
    def begins(self) -> tuple[str, ...]:
        return (self.section[0],)

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.section, *self.call, self.separator)

    def read(self, reader: TextReader, out: AnswerOutput) -> Reading[bool]:
        while True:
            yield from reader.blanks()
            if (yield from reader.take(self.section[1])):
                return True
            if not (yield from reader.take(self.call[0])) or not (yield from self._read_call(reader, out)):
                return False

    def _read_call(self, reader: TextReader, out: AnswerOutput) -> Reading[bool]:
        head: list[str] = []
        if (yield from reader.until((self.separator,), head.append)) is None:
            return False
        name, is_fenced = "".join(head).strip(), False
        if name == "function":
            head.clear()
            is_fenced = (yield from reader.until(("\n```json\n",), head.append)) is not None
            name = "".join(head)
        name = name.removeprefix("functions.")
        name = name.rpartition(":")[0] if name.rpartition(":")[2].isdecimal() and ":" in name else name
        if not (yield from _read_arguments(reader, out, name)):
            return False
        yield from reader.blanks()
        if is_fenced:
            yield from reader.take("```")
        return (yield from reader.take(self.call[1]))


def _read_arguments(reader: TextReader, out: AnswerOutput, name: str) -> Reading[bool]:
    """Reads the arguments of a call whose name is known."""
    yield from reader.blanks()
    name = name.strip()
    if not name or (yield from reader.peek()) != "{":
        return False
    out.begin_call(name)
    return (yield from reader.json_value(out.arguments))


def compact(value: object) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)
