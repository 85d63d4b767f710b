"""The parts of an answer that are trained on: its text, its reasoning, its tool calls."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from ftray.chat.answer_text import AnswerText
from ftray.chat.messages import Message
from ftray.errors import DataError

Ranges = tuple[tuple[int, int], ...]  # [start, end) in characters

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
            or (self.reasoning and bool(message.reasoning or inline))
            or (self.tool_calls and bool(message.tool_calls))
        )


@dataclass(frozen=True)
class _Part:
    """A part of an answer: [start, end) of its text."""

    kind: str
    start: int
    end: int


def trained_ranges(answer: AnswerText, message: Message, train_on: TrainOn) -> Ranges:
    """The parts of an answer that are trained on. The end token is one of them if any other part is.

    Template text between two parts belongs to the reasoning before it, or else to the part after it.

    Args:
        answer: The answer's text.
        message: The answer.
        train_on: The parts to train on.

    Raises:
        DataError: The template changes a text, so that the part cannot be found.
    """
    parts = sorted(_parts(answer.text[: answer.body], message), key=lambda part: part.start)
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


def _parts(text: str, message: Message) -> list[_Part]:
    inline = INLINE.match(message.content)
    reasoning = (message.reasoning or (inline[1] if inline else "")).strip()
    content = (message.content[inline.end() :] if inline else message.content).strip()
    parts, at = [], 0
    if reasoning:
        parts.append(_find(text, "reasoning", reasoning, 0))
        at = parts[-1].end
    if content:
        parts.append(_find(text, "assistant", content, at))
    if message.tool_calls:
        names = [call.name for call in message.tool_calls]
        taken = [part for part in parts if part.kind == "assistant"]
        first = _first(text, names[0], at, taken)
        parts.append(_Part("tool_calls", first, _end_of_calls(text, first, taken)))
    return parts


def _find(text: str, kind: str, part: str, at: int) -> _Part:
    start = text.find(part, at)
    if start < 0:
        raise DataError(
            f"the chat template changes the text of an answer ({part[:40]!r}), so data.train_on cannot tell its parts apart; "
            "train on whole answers"
        )
    return _Part(kind, start, start + len(part))


def _first(text: str, name: str, at: int, taken: list[_Part]) -> int:
    """Where the name of a tool is written, outside the answer's text."""
    while (start := text.find(name, at)) >= 0:
        inside = [part for part in taken if part.start <= start < part.end]
        if not inside:
            return start
        at = inside[0].end
    raise DataError(f"the tool call {name} cannot be found in the answer; train on whole answers")


def _end_of_calls(text: str, first: int, taken: list[_Part]) -> int:
    """Where the calls end: before the answer's text if it follows, else at the end of the text before white space."""
    after = [part.start for part in taken if part.start > first]
    return min(after) if after else len(text.rstrip())
