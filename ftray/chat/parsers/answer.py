"""Parses the text of an answer into reasoning, content and tool calls, while it is generated.

`AnswerSyntax` says how a chat template writes them. Text that is no call, although it begins like one, becomes content.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ftray.chat.messages import ToolCall
from ftray.chat.parsers.reader import Reading, TextReader


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer.

    Attributes:
        kind: `call` begins a tool call, whose name is `text`; `arguments` continues it with a piece of its JSON.
        call: Number of the call, from 0.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    call: int = 0


class AnswerOutput:
    """Collects the pieces of an answer. tools: JSON schemas of the parameters, by name."""

    def __init__(self, tools: dict[str, dict[str, Any]]) -> None:
        self.tools, self.deltas, self.num_calls = tools, list[Delta](), 0

    def reasoning(self, text: str) -> None:
        self.deltas.append(Delta("reasoning", text))

    def content(self, text: str) -> None:
        self.deltas.append(Delta("content", text))

    def begin_call(self, name: str) -> None:
        self.deltas.append(Delta("call", name, self.num_calls))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        self.deltas.append(Delta("arguments", text, self.num_calls - 1))


class CallSyntax(Protocol):
    """How a family of models writes tool calls."""

    @property
    def name(self) -> str:
        """The family."""

    @property
    def begins(self) -> tuple[str, ...]:
        """Texts that begin a call, or a list of calls."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All texts of the syntax that may be special tokens."""

    @property
    def is_bare(self) -> bool:
        """Whether an answer that begins with `{` may be a call."""

    def read(self, reader: TextReader, out: AnswerOutput) -> Reading[bool]:
        """Reads what follows one of `begins`. False if it is no call and nothing of it was written to `out`."""


class AnswerSyntax(Protocol):
    """How a family of models writes whole answers."""

    def markers(self, *, reads_calls: bool) -> tuple[str, ...]:
        """All texts of the syntax that may be special tokens."""

    @property
    def reasoning(self) -> tuple[str, str] | None:
        """The markers around the reasoning."""

    def read(self, reader: TextReader, out: AnswerOutput, *, reads_calls: bool, in_reasoning: bool) -> Reading[None]:
        """Reads an answer to its end."""


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer that is content, with reasoning before it and calls in it, each between markers.

    Attributes:
        calls: The syntax of calls, or None if the template has none.
        reasoning: The markers around the reasoning, or None.
    """

    calls: CallSyntax | None = None
    reasoning: tuple[str, str] | None = None

    def markers(self, *, reads_calls: bool) -> tuple[str, ...]:
        return (*(self.calls.markers if self.calls and reads_calls else ()), *(self.reasoning or ()))

    def read(self, reader: TextReader, out: AnswerOutput, *, reads_calls: bool, in_reasoning: bool) -> Reading[None]:
        if self.reasoning is not None:
            yield from self._read_reasoning(reader, out, self.reasoning, in_reasoning)
        calls = self.calls if reads_calls else None
        if calls is None:
            yield from reader.until((), out.content)
            return
        if calls.is_bare:
            yield from _read_bare(calls, reader, out)
        while (begin := (yield from reader.until(calls.begins, out.content, strips=True))) is not None:
            reader.record(reader.stripped + begin)
            num_calls = out.num_calls
            yield from calls.read(reader, out)
            text = reader.recorded()
            if out.num_calls == num_calls:
                out.content(text)
            else:
                yield from reader.blanks()

    @staticmethod
    def _read_reasoning(
        reader: TextReader, out: AnswerOutput, marks: tuple[str, str], in_reasoning: bool
    ) -> Reading[None]:
        begin, end = marks
        reader.record("")
        yield from reader.blanks()
        if (yield from reader.take(begin)) or in_reasoning:
            reader.recorded()
            yield from reader.blanks()
            yield from reader.until((end,), out.reasoning, strips=True)
            yield from reader.blanks()
        elif blanks := reader.recorded():
            out.content(blanks)


def _read_bare(calls: CallSyntax, reader: TextReader, out: AnswerOutput) -> Reading[None]:
    """Reads the beginning of an answer that may be a call without a marker."""
    reader.record("")
    yield from reader.blanks()
    if (yield from reader.peek()) == "{":
        yield from calls.read(reader, out)
    text = reader.recorded()
    if out.num_calls == 0 and text:
        out.content(text)


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


class AnswerParser:
    """Parses one answer.

    Args:
        syntax: How its template writes answers.
        tools: The tools that it may call, in the form of OpenAI's API.
        reads_calls: Whether calls are looked for.
        in_reasoning: Whether the prompt has begun the reasoning already.
    """

    def __init__(
        self,
        syntax: AnswerSyntax,
        tools: Sequence[dict[str, Any]] = (),
        *,
        reads_calls: bool = True,
        in_reasoning: bool = False,
    ) -> None:
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._reader, self._out = TextReader(), AnswerOutput(schemas)
        self._reading = syntax.read(self._reader, self._out, reads_calls=reads_calls, in_reasoning=in_reasoning)
        self._is_over = False

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return self._out.num_calls

    def push(self, text: str) -> list[Delta]:
        """The pieces that became known with this text."""
        self._reader.feed(text)
        return self._advance()

    def finish(self) -> list[Delta]:
        """The rest, after the last text."""
        self._reader.is_complete = True
        return self._advance()

    def _advance(self) -> list[Delta]:
        if not self._is_over:
            try:
                next(self._reading)
            except StopIteration:
                self._is_over = True
        deltas, self._out.deltas = self._out.deltas, []
        return deltas


@dataclass
class AnswerParts:
    """Collects pieces into an answer.

    Attributes:
        calls: Of each call its name and the JSON of its arguments.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if delta.kind == "content":
                self.content += delta.text
            elif delta.kind == "reasoning":
                self.reasoning += delta.text
            elif delta.kind == "call":
                self.calls.append((delta.text, ""))
            else:
                name, arguments = self.calls[-1]
                self.calls[-1] = (name, arguments + delta.text)


def parse_answer(
    text: str, syntax: AnswerSyntax, tools: Sequence[dict[str, Any]] = (), *, in_reasoning: bool = False
) -> Answer:
    """Parses a whole answer.

    Raises:
        ValueError: A call's arguments are not a JSON object.
    """
    parser, parts = AnswerParser(syntax, tools, in_reasoning=in_reasoning), AnswerParts()
    parts.add(parser.push(text))
    parts.add(parser.finish())
    calls = []
    for name, arguments in parts.calls:
        if not isinstance(parsed := json.loads(arguments), dict):
            raise ValueError(f"the arguments of {name} are not an object")
        calls.append(ToolCall(name, parsed))
    return Answer(parts.content, parts.reasoning, tuple(calls))
