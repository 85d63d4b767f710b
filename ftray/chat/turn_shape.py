"""Finds out in which form a chat template reads tools, tool calls, their results and reasoning.

Templates disagree: arguments as an object or as JSON text, `reasoning_content` or `thinking`, an empty text or none beside
calls, ids of nine letters and digits. Small probe conversations show what a template accepts and writes. A field that it
leaves out is known by name, so that no record is trained on without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ftray.chat.messages import REASONING_KEYS, Conversation, Message, ToolCall
from ftray.chat.template_limits import TemplateLimitError

Turns = list[dict[str, Any]]
Render = Callable[[Turns, Sequence[dict[str, Any]], bool], str]  # turns, tools, generation prompt → text

ABSENT = "absent"  # of the content key
SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")  # the only ids that Mistral's templates accept
# Texts that no template writes by itself.
THOUGHT, ANSWER, RESULT, TOOL, OTHER_TOOL, KEY, VALUE = (
    "qt7919",
    "qa7919",
    "qr7919",
    "qf7919",
    "qg7919",
    "qk7919",
    "qv7919",
)
LONG_ID = "call_7919qaqaqa7919qaqa"
QUESTION = Message("user", "a")
CALL = ToolCall(TOOL, {KEY: VALUE}, LONG_ID)
CALLING = Message("assistant", "", tool_calls=(CALL,))
CALLING_TWICE = Message("assistant", "", tool_calls=(CALL, ToolCall(OTHER_TOOL, {KEY: VALUE}, LONG_ID + "q")))
TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {KEY: {"type": "string", "description": "d"}},
                "required": [KEY],
            },
        },
    }
    for name in (TOOL, OTHER_TOOL)
)


@dataclass(frozen=True)
class TurnShape:
    """The form of the turns that a template reads, and the fields that it writes.

    Attributes:
        reasoning_key: The key of reasoning; None if the template leaves reasoning out.
        content_beside_calls: The content of a turn that has calls but no text: empty, None, or ABSENT.
        arguments_as_text: Whether arguments are JSON text instead of an object.
        has_short_ids: Whether ids must have nine letters and digits.
        writes_calls: Whether it writes the calls of a turn.
        writes_several_calls: Whether it writes all calls of a turn that has several.
        writes_tools: Whether it writes the tools.
        has_developer: Whether it knows the role developer; else these turns are system turns.
    """

    reasoning_key: str | None = None
    content_beside_calls: str | None = ""
    arguments_as_text: bool = False
    has_short_ids: bool = False
    writes_calls: bool = False
    writes_several_calls: bool = False
    writes_tools: bool = False
    has_developer: bool = False

    def turns(self, conversation: Conversation) -> Turns:
        """The messages as the template reads them. Fields without a value are left out, because templates look for keys."""
        ids = _Ids(self.has_short_ids)
        return [self._turn(message, ids) for message in conversation.messages]

    def _turn(self, message: Message, ids: _Ids) -> dict[str, Any]:
        role = "system" if message.role == "developer" and not self.has_developer else message.role
        turn: dict[str, Any] = {"role": role, "content": message.content}
        if message.reasoning:
            turn[self.reasoning_key or REASONING_KEYS[0]] = message.reasoning
        if message.tool_calls:
            if not message.content:
                turn["content"] = self.content_beside_calls
            if turn["content"] == ABSENT and not message.content:
                del turn["content"]
            turn["tool_calls"] = [self._call(call, ids.of_call(call)) for call in message.tool_calls]
        if message.role == "tool":
            call_id, name = ids.of_result(message)
            turn |= {"tool_call_id": call_id} if call_id else {}
            turn |= {"name": name} if name else {}
        elif message.name:
            turn["name"] = message.name
        return turn

    def _call(self, call: ToolCall, call_id: str) -> dict[str, Any]:
        arguments = json.dumps(call.arguments, ensure_ascii=False) if self.arguments_as_text else call.arguments
        return {"type": "function", "id": call_id, "function": {"name": call.name, "arguments": arguments}}


class _Ids:
    """Ids of calls and results. A record may have none; then results belong to calls in their order."""

    def __init__(self, are_short: bool) -> None:
        self._are_short = are_short
        self._number = 0
        self._new: dict[str, str] = {}  # id in the record → id in the text
        self._open: list[tuple[str, str]] = []  # (id, tool) of the calls without a result

    def of_call(self, call: ToolCall) -> str:
        new = call.id
        if not new or (self._are_short and not SHORT_ID.fullmatch(new)):
            new = f"call{self._number:05d}"
        self._number += 1
        self._new[call.id] = new
        self._open.append((new, call.name))
        return new

    def of_result(self, message: Message) -> tuple[str, str]:
        """Id and tool of a result."""
        call_id = self._new.get(message.tool_call_id, message.tool_call_id)
        at = next((i for i, (each, _) in enumerate(self._open) if each == call_id or not message.tool_call_id), None)
        if at is None:
            return call_id, message.name
        call_id, name = self._open.pop(at)
        return call_id, message.name or name


def find_turn_shape(source: str, render: Render) -> TurnShape:
    """Probes a template.

    Args:
        source: The template's source.
        render: Renders turns and tools. It may raise anything.
    """
    shape = _shape_of_calls(render)
    shape = replace(shape, reasoning_key=_reasoning_key(shape, render))
    tools_shown = _try(render, shape.turns(Conversation((QUESTION,))), TOOLS)
    developer = Conversation((Message("developer", ANSWER), QUESTION))
    shown = _try(render, replace(shape, has_developer=True).turns(developer))
    return replace(
        shape,
        writes_tools=TOOL in tools_shown and OTHER_TOOL in tools_shown,
        has_developer="developer" in source and ANSWER in shown,
    )


def _shape_of_calls(render: Render) -> TurnShape:
    """The first of the usual forms of a turn with calls in which the template writes the call."""
    result = Message("tool", RESULT, tool_call_id=LONG_ID, name=TOOL)
    for shape in _candidates():
        text = _try(render, shape.turns(Conversation((QUESTION, CALLING, result))))
        if TOOL in text and KEY in text and VALUE in text and not re.search(rf"\\+\W*{KEY}", text):
            several = _try(render, shape.turns(Conversation((QUESTION, CALLING_TWICE))))
            return replace(shape, writes_calls=True, writes_several_calls=OTHER_TOOL in several)
    return TurnShape()


def _candidates() -> Iterator[TurnShape]:
    for short, content, as_text in product((False, True), ("", None, ABSENT), (False, True)):
        yield TurnShape(content_beside_calls=content, arguments_as_text=as_text, has_short_ids=short)


def _reasoning_key(shape: TurnShape, render: Render) -> str | None:
    answers = [Message("assistant", ANSWER, reasoning=THOUGHT)]
    if shape.writes_calls:  # some templates write reasoning beside calls only
        answers.append(replace(CALLING, reasoning=THOUGHT))
    for answer, key in product(answers, REASONING_KEYS):
        if THOUGHT in _try(render, replace(shape, reasoning_key=key).turns(Conversation((QUESTION, answer)))):
            return key
    return None


def _try(render: Render, turns: Turns, tools: Sequence[dict[str, Any]] = (), prompt: bool = False) -> str:
    """The rendered text, empty if the template refuses."""
    try:
        return render(turns, tools, prompt)
    except TemplateLimitError:
        raise  # it would cost as much again for every form
    except Exception:  # noqa: BLE001 - a template may raise anything
        return ""
