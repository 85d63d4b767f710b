"""The parts of an answer that are trained on: its text, its reasoning, its tool calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from ftray.chat.answer_text import AnswerText
from ftray.chat.messages import Message
from ftray.chat.renderer import shared_length
from ftray.chat.turn_shape import ANSWER, THOUGHT, TOOL
from ftray.errors import DataError

Ranges = tuple[tuple[int, int], ...]  # [start, end) in characters
ReadOther = Callable[[Message], str]  # another message in the place of the answer → its text. Raises DataError.

INLINE = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class TrainOn:
    """What is trained on.

    Attributes:
        assistant: The text of answers.
        reasoning: The reasoning of answers.
        tool_calls: The tool calls of answers.
        last_turn_only: Only the last answer of a conversation.
    """

    assistant: bool = True
    reasoning: bool = True
    tool_calls: bool = True
    last_turn_only: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether whole answers are trained on."""
        return self.assistant and self.reasoning and self.tool_calls

    def selects(self, message: Message) -> bool:
        """Whether any part of an answer is trained on."""
        inline = INLINE.match(message.content)
        content = message.content[inline.end() :] if inline else message.content
        return (
            (self.assistant and bool(content.strip()))
            or (self.reasoning and bool((message.reasoning or (inline[1] if inline else "")).strip()))
            or (self.tool_calls and bool(message.tool_calls))
        )


@dataclass(frozen=True)
class _Part:
    """A part of an answer: [start, end) of its text."""

    kind: str
    start: int
    end: int


def trained_ranges(answer: AnswerText, message: Message, train_on: TrainOn, read_other: ReadOther) -> Ranges:
    """The parts of an answer that are trained on. The end token is one of them if any other part is.

    Template text between two parts belongs to the reasoning before it, or else to the part after it.

    Args:
        answer: The answer's text.
        message: The answer.
        train_on: The parts to train on.
        read_other: The text of another message in the same place.

    Raises:
        DataError: The template changes a text, so that the part cannot be found.
    """
    parts = sorted(_parts(answer, message, read_other), key=lambda part: part.start)
    if not parts:
        return ((0, answer.end),) if train_on.assistant else ()
    borders = [0]
    for part, after in pairwise(parts):
        borders.append(after.start if part.kind == "reasoning" else part.end)
    borders.append(parts[-1].end)
    ranges = [
        (start, stop)
        for part, (start, stop) in zip(parts, pairwise(borders), strict=True)
        if getattr(train_on, part.kind)
    ]
    if ranges:
        ranges.append((parts[-1].end, answer.end))
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def _parts(answer: AnswerText, message: Message, read_other: ReadOther) -> list[_Part]:
    """The parts, found by placeholders: their texts may also stand in the template's own text, or in each other."""
    text, content = answer.text, message.content
    inline = INLINE.match(content)
    head, body = (content[: inline.end()], content[inline.end() :]) if inline else ("", content)
    parts = []
    if message.reasoning.strip():
        other = replace(message, reasoning=_with_core(message.reasoning, THOUGHT))
        parts.append(_find(text, "reasoning", message.reasoning, THOUGHT, read_other(other)))
    elif inline and inline[1].strip():
        start, end = inline.span(1)
        other = replace(message, content=head[:start] + _with_core(inline[1], THOUGHT) + head[end:] + body)
        parts.append(_find(text, "reasoning", inline[1], THOUGHT, read_other(other)))
    if body.strip():
        other = replace(message, content=head + _with_core(body, ANSWER))
        parts.append(_find(text, "assistant", body, ANSWER, read_other(other)))
    if message.tool_calls:
        parts.append(_find_calls(answer, message, parts, read_other))
    return parts


def _with_core(text: str, core: str) -> str:
    """A text with the white space around it kept."""
    return text[: len(text) - len(text.lstrip())] + core + text[len(text.rstrip()) :]


def _find(text: str, kind: str, part: str, placeholder: str, other: str) -> _Part:
    """A part, where another text has its placeholder."""
    start = other.find(placeholder)
    after = other[start + len(placeholder) :]
    end, part = len(text) - len(after), part.strip()
    if start < 0 or not (text.startswith(other[:start]) and text.endswith(after) and text[start:end] == part):
        raise DataError(
            f"the chat template changes the text of an answer ({part[:40]!r}), so data.train_on cannot tell its parts apart; "
            "train on whole answers"
        )
    return _Part(kind, start, end)


def _find_calls(answer: AnswerText, message: Message, parts: list[_Part], read_other: ReadOther) -> _Part:
    """The calls: between the reasoning and the text, or behind both."""
    text, first = answer.text[: answer.body], message.tool_calls[0]
    name = f"x{TOOL}" if first.name.startswith(TOOL[0]) else TOOL
    other = read_other(replace(message, tool_calls=(replace(first, name=name), *message.tool_calls[1:])))
    start = shared_length(text, other)
    if not text.startswith(first.name, start):
        raise DataError(f"the tool call {first.name} cannot be found in the answer; train on whole answers")
    after = [part.start for part in parts if part.kind == "assistant" and part.start > start]
    if (parts and parts[-1].kind == "reasoning") or after:  # what a text would follow as well belongs to the reasoning
        inline = INLINE.match(message.content) if after else None
        head = message.content[: inline.end()] if inline else "" if after else message.content
        rest = read_other(replace(message, content=head + ANSWER, tool_calls=()))
        ends = [part.end for part in parts if part.kind == "reasoning"]
        start = min(start, max([shared_length(text, rest), *ends]))
    return _Part("tool_calls", start, min(after) if after else len(text.rstrip()))
