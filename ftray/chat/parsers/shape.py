"""The texts around the parts of an answer, taken from answers that the chat template has rendered.

Constrained answers are written with exactly these texts, which are those that the model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.chat.messages import ToolCall

CONTENT, REASONING = "Some words 7937", "Some thoughts 7933"
KEYS, VALUES = ("key_7901", "key_7907"), ("text 7919", "text 7927")

Write = Callable[[str, str, Sequence[ToolCall]], str | None]  # content, reasoning, calls → the rendered answer


@dataclass(frozen=True)
class ArgumentTags:
    """The texts around the arguments of calls that have tags.

    Attributes:
        start: After the call's name.
        key: Before an argument's name.
        value: Between an argument's name and its value.
        end: After a value.
        finish: After the last argument.
    """

    start: str
    key: str
    value: str
    end: str
    finish: str


@dataclass(frozen=True)
class CallShape:
    """The texts around calls.

    Attributes:
        begin: Before the name of the first call.
        middle: Between a name and the JSON of its arguments.
        between: Between the arguments of a call and the name of the next one; None: there can only be one.
        end: After the last call's arguments.
        separators: Between items, and between keys and values, in the arguments' JSON.
        tags: Instead of middle and JSON, tags around each argument.
    """

    begin: str
    middle: str
    between: str | None
    end: str
    separators: tuple[str, str] = (", ", ": ")
    tags: ArgumentTags | None = None


@dataclass(frozen=True)
class ReasoningShape:
    """The texts around the reasoning.

    Attributes:
        begin: Before it, unless the prompt has it.
        end: After it.
        mark: The marker in `end`.
        is_always_there: Whether answers without reasoning have the texts, too.
    """

    begin: str
    end: str
    mark: str
    is_always_there: bool


@dataclass(frozen=True)
class AnswerShape:
    """The texts of an answer.

    Attributes:
        content: Before the content.
        content_end: After it.
        calls: Around calls, if the template has any that can be constrained.
        reasoning: Around reasoning.
        call_ids: Ids of calls in these texts, which stand for any id.
    """

    content: str = ""
    content_end: str = ""
    calls: CallShape | None = None
    reasoning: ReasoningShape | None = None
    call_ids: tuple[str, ...] = ()

    @property
    def is_bare_text(self) -> bool:
        """Whether an answer without calls is nothing but its content."""
        return not self.content and not self.content_end and self.reasoning is None


def find_shape(write: Write, end_mark: str | None, calls: Sequence[ToolCall]) -> AnswerShape:
    """The texts of a template's answers.

    Args:
        write: Renders an answer; None if the template cannot.
        end_mark: The marker that ends the reasoning.
        calls: Two calls with different names, to render.
    """
    plain = write(CONTENT, "", ()) or CONTENT
    reasoning = _find_reasoning(write(CONTENT, REASONING, ()), plain, end_mark)
    content, _, content_end = plain.partition(CONTENT)
    call_shape = _find_calls(write, calls)
    if reasoning is not None and reasoning.is_always_there:
        head = reasoning.begin + reasoning.end
        content = content.removeprefix(head)
        if call_shape is not None:
            call_shape = _without_head(call_shape, head)
    return AnswerShape(content, content_end, call_shape, reasoning, tuple(call.id for call in calls))


def _find_reasoning(text: str | None, plain: str, end_mark: str | None) -> ReasoningShape | None:
    if text is None or end_mark is None or REASONING not in text:
        return None
    begin, _, after = text.partition(REASONING)
    if end_mark not in after:
        return None
    at = after.index(end_mark) + len(end_mark)
    if plain == begin + after:
        while after[at : at + 1].isspace():
            at += 1
        return ReasoningShape(begin, after[:at], end_mark, is_always_there=True)
    if after.endswith(plain):
        at = len(after) - len(plain)
        return ReasoningShape(begin, after[:at], end_mark, is_always_there=False)
    return None


def _without_head(shape: CallShape, head: str) -> CallShape | None:
    if not shape.begin.startswith(head):
        return None
    return CallShape(
        shape.begin.removeprefix(head), shape.middle, shape.between, shape.end, shape.separators, shape.tags
    )


def _find_calls(write: Write, calls: Sequence[ToolCall]) -> CallShape | None:
    first, second = calls
    text = write("", "", (first,))
    if text is None or first.name not in text:
        return None
    begin, _, rest = text.partition(first.name)
    span = _find_json(rest, first.arguments)
    if span is None:
        return _find_tagged(write, calls)
    middle, arguments, end = rest[: span[0]], rest[span[0] : span[1]], rest[span[1] :]
    separators = (", " if '", ' in arguments or "], " in arguments else ",", ": " if '": ' in arguments else ":")
    shape = CallShape(begin, middle, None, end, separators)
    both = (write("", "", (first, second)) or "").replace(second.id, first.id)
    if not both.startswith(begin + first.name + middle + arguments):
        return shape
    rest = both[len(begin + first.name + middle + arguments) :]
    between, name, rest = rest.partition(second.name)
    span = _find_json(rest, second.arguments) if name else None
    if span is None or rest[: span[0]] != middle or rest[span[1] :] != end:
        return shape
    return CallShape(begin, middle, between, end, separators)


def _find_json(text: str, value: dict[str, Any]) -> tuple[int, int] | None:
    """Where a JSON object of this value stands in a text."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            parsed, end = decoder.raw_decode(text, at)
        except ValueError:
            parsed, end = None, at
        if parsed == value:
            return at, end
        at = text.find("{", at + 1)
    return None


def _find_tagged(write: Write, calls: Sequence[ToolCall]) -> CallShape | None:
    name, other = calls[0].name, calls[1].name
    text = write("", "", (ToolCall(name, dict(zip(KEYS, VALUES, strict=True)), calls[0].id),))
    empty = write("", "", (ToolCall(name, {}, calls[0].id),))
    if text is None or empty is None or not all(part in text for part in (*KEYS, *VALUES)):
        return None
    begin, _, rest = text.partition(name)
    before_key, _, rest = rest.partition(KEYS[0])
    value, _, rest = rest.partition(VALUES[0])
    between, _, rest = rest.partition(KEYS[1])
    finish = rest.partition(VALUES[1])[2]
    tags = _split_tags(before_key, value, between, finish, empty.partition(name)[2])
    if tags is None:
        return None
    both = write("", "", tuple(ToolCall(call.name, {}, call.id) for call in calls))
    head = begin + name + tags.start
    gap = None
    if both is not None and both.startswith(head) and both.endswith(other + tags.start + tags.finish):
        gap = both[len(head) : -len(other + tags.start + tags.finish)]
    return CallShape(begin, "", gap, tags.finish, tags=tags)


def _split_tags(before_key: str, value: str, between: str, finish: str, empty: str) -> ArgumentTags | None:
    """Splits the text between two arguments into the end of one and the beginning of the next."""
    for at in range(len(between) - 1, -1, -1):
        end, key = between[:at], between[at:]
        if key.startswith("<") and before_key.endswith(key) and finish.startswith(end):
            tags = ArgumentTags(before_key[: -len(key)], key, value, end, finish[len(end) :])
            if tags.start + tags.finish == empty:
                return tags
    return None
