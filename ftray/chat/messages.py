"""The messages of a conversation, its tools, and how they are read. Knows no template and no tokenizer.

`read_messages` reads the turns of OpenAI's API (`role` and `content`) and of ShareGPT (`from` and `value`). Each key of a turn
is used, harmless (`HARMLESS_KEYS`), or refused by name. A key whose value is null or empty counts as absent, because Arrow
and OpenAI's clients fill missing keys in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ftray.chat.json_text import RepeatedKey, check_writable, parse_json
from ftray.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {  # names of other formats and APIs
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # turns whose text is the JSON of one or more calls
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TRAIN_KEYS = ("train", "training", "loss", "weight", "loss_weight")
MAX_WEIGHT, MAX_SHOWN = 1_000_000, 40  # characters of a wrong value
CALL_KEYS = ("tool_calls", "function_call")
USED_KEYS = ("role", "from", "content", "value", "name", "tool_call_id", *REASONING_KEYS, *TRAIN_KEYS, *CALL_KEYS)
# Facts about a turn that no model reads: they change neither its text nor whether it is trained on.
HARMLESS_KEYS = (
    "created",
    "created_at",
    "finish_reason",
    "id",
    "index",
    "lang",
    "language",
    "message_id",
    "model",
    "num_tokens",
    "status",
    "stop_reason",
    "timestamp",
    "token_count",
    "turn",
    "turn_id",
    "usage",
    "uuid",
)
TEXT_PARTS = ("text", "input_text", "output_text")
PART_TEXT_KEYS = ("text", "value")
# Facts about a content part that no model reads.
HARMLESS_PART_KEYS = ("annotations", "cache_control", "citations", "id", "index", "logprobs", "signature")
WRAPPED_CALL_KEYS, FUNCTION_KEYS = ("id", "type", "function", "index"), ("name", "arguments")
BARE_CALL_KEYS = ("id", "type", "index", *FUNCTION_KEYS)


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the assistant. id: links it to its result; empty if the record has none."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: One of ROLES.
        content: The text. Empty for null beside tool calls.
        train: Matters in assistant messages only: False excludes the message from the loss.
        weight: Factor of the loss of its tokens.
        reasoning: The text that the assistant thinks before it answers.
        tool_calls: Calls of an assistant message.
        tool_call_id: The call that a tool message answers.
        name: The tool of a tool message.
    """

    role: str
    content: str
    train: bool = True
    weight: float = 1.0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """All that it says: its reasoning, its content and its calls."""
        if not (self.reasoning or self.tool_calls):
            return self.content
        calls = [f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}" for call in self.tool_calls]
        return "\n".join(part for part in (self.reasoning, self.content, *calls) if part)


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation, and the tools that the assistant may call.

    Attributes:
        messages: In order.
        tools: Each as OpenAI's API has it: `{"type": "function", "function": {"name": …, "parameters": …}}`.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = field(default=())

    @cached_property
    def is_plain(self) -> bool:
        """Whether it consists of texts only, so that every template reads it in the same form."""
        return not self.tools and not any(
            m.tool_calls or m.reasoning or m.name or m.tool_call_id or m.role == "developer" for m in self.messages
        )

    def until(self, end: int) -> Conversation:
        """The conversation before the message with this number."""
        return Conversation(self.messages[:end], self.tools)


def read_messages(raw: object) -> tuple[Message, ...]:
    """Reads turns: `[{"role": …, "content": …}]`, or ShareGPT's `[{"from": …, "value": …}]`. Raises DataError naming the turn."""
    if not isinstance(raw, list) or not raw:
        raise DataError("messages must be a list with at least one turn")
    return tuple([_plain_turn(turn) or _read_turn(f"turn {i}", turn) for i, turn in enumerate(raw)])


def read_tools(raw: object) -> tuple[dict[str, Any], ...]:
    """Reads the tools of a record, in the form of OpenAI's API.

    Args:
        raw: A list of tools, or the list as JSON. A tool is OpenAI's (`{"type": "function", "function": {…}}`) or a bare
            function (`{"name": …, "parameters": …}`). Null and empty mean no tools.

    Raises:
        DataError: It is neither. The message names the tool.
    """
    if isinstance(raw, str):
        raw = _json(raw, "tools") if raw.strip() else None
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise DataError(f"tools must be a list of functions, not {_kind(raw)}")
    return tuple(_read_tool(f"tool {i}", tool) for i, tool in enumerate(raw))


def _read_tool(where: str, tool: object) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise DataError(f"{where} must be an object with a name and parameters, not {_kind(tool)}")
    if tool.get("type", "function") != "function" or ("function" not in tool and "name" not in tool):
        raise DataError(f'{where} is not a function; use {{"type": "function", "function": {{"name": …}}}}')
    function = tool["function"] if "function" in tool else {key: value for key, value in tool.items() if key != "type"}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where} has no name")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise DataError(f"{where} ({function['name']}): parameters must be a JSON schema, an object")
    if extra := [
        key for key, value in tool.items() if "function" in tool and key not in ("type", "function") and value
    ]:
        raise DataError(f"{where} ({function['name']}) has {extra[0]} beside its function; move it into the function")
    check_writable(function, f"{where} ({function['name']})")
    return {"type": "function", "function": function}


def _plain_turn(raw: object) -> Message | None:
    """A turn of a role and a text only, which are most turns; None for all others."""
    if not isinstance(raw, dict) or len(raw) != 2:
        return None
    role, content = raw.get("role"), raw.get("content")
    return Message(role, content) if isinstance(content, str) and isinstance(role, str) and role in ROLES else None


def _read_turn(where: str, raw: object) -> Message:
    if not isinstance(raw, dict):
        raise DataError(f"{where} must be an object with role and content")
    if len(raw) == 2 and raw.get("role") in ROLES and isinstance(raw.get("content"), str):
        return Message(raw["role"], raw["content"])  # most turns, and millions of them
    turn = {key: value for key, value in raw.items() if not _is_empty(value)}
    label = _either(turn, "role", "from", where)
    role = _read_role(label, where)
    where = f"{where} ({role})"
    if unknown := [key for key in turn if key not in USED_KEYS and key not in HARMLESS_KEYS and turn[key] != ""]:
        raise DataError(f"{where} has the key {unknown[0]}, which is not supported; remove it")
    text, thought, written_calls = _read_content(_either(turn, "content", "value", where), where)
    calls = (*_read_calls(turn, where), *written_calls)
    if isinstance(label, str) and label.lower() in CALL_ROLES:
        calls, text = (*calls, *_parse_calls(text or "", where)), ""
    reasoning = _read_reasoning(turn, thought, where)
    if role != "assistant" and (calls or reasoning):
        raise DataError(
            f"{where} has {'tool calls' if calls else 'reasoning'}, which only the assistant's turns may have"
        )
    if text is None and not calls and role != "tool":
        raise DataError(f"{where} has no text; content must be a string")
    train, weight = _read_training(turn, role, where)
    ids = {key: turn.get(key, "") for key in ("tool_call_id", "name")}
    if wrong := [key for key, value in ids.items() if not isinstance(value, str)]:
        raise DataError(f"{where}: {wrong[0]} must be a string, not {_kind(ids[wrong[0]])}")
    return Message(role, text or "", train, weight, reasoning, calls, **ids)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, list | dict) and not value)


def _either(turn: Mapping[str, Any], key: str, other: str, where: str) -> object:
    """The value of one of two keys that mean the same."""
    if key in turn and other in turn and turn[key] != turn[other]:
        raise DataError(f"{where} has both {key} and {other}; remove one of them")
    return turn.get(key, turn.get(other))


def _read_role(label: object, where: str) -> str:
    role = label.strip().lower() if isinstance(label, str) else ""
    role = OTHER_ROLES.get(role, role)
    if role not in ROLES:
        raise DataError(f"{where} has the role {label!r}; use one of {', '.join(ROLES)}")
    return role


def _read_content(content: object, where: str) -> tuple[str | None, str, tuple[ToolCall, ...]]:
    """The text of a turn, None if it has none, and the reasoning and calls among its parts.

    Parts come in the order in which templates write them: reasoning, text, calls. Each holds its text under `text`, `value` (as
    LLaMA-Factory writes it) or the name of its type.
    """
    if content is None or isinstance(content, str):
        return content, "", ()
    if not isinstance(content, list):
        raise DataError(f"{where}: content must be a string or a list of text parts, not {_kind(content)}")
    texts: dict[str, list[str]] = {"reasoning": [], "text": [], "tool_call": []}
    for part in content:
        kind, text = _read_part(part, where)
        later = list(texts)[list(texts).index(kind) + 1 :]
        if text and any(texts[other] for other in later):
            raise DataError(f"{where} has {kind} after another part; put reasoning first, then text, then calls")
        texts[kind].append(text)
    calls = [call for text in texts["tool_call"] for call in _parse_calls(text, where)]
    is_call_only = calls and not texts["text"]
    return None if is_call_only else "".join(texts["text"]), "".join(texts["reasoning"]), tuple(calls)


def _read_part(part: object, where: str) -> tuple[str, str]:
    """The kind of a part of a content, `reasoning`, `text` or `tool_call`, and its text."""
    if isinstance(part, str):
        return "text", part
    label = part.get("type") if isinstance(part, dict) else None
    kind = "text" if label in TEXT_PARTS else "reasoning" if label in ("thinking", "reasoning") else label
    if not isinstance(part, dict) or kind not in ("text", "reasoning", "tool_call"):
        raise DataError(
            f"{where} has a content part of type {label!r}; only text, reasoning and tool calls are supported"
        )
    used = ("type", *PART_TEXT_KEYS, str(label))
    _refuse_others(part, (*used, *HARMLESS_PART_KEYS), f"{where}, in a content part of type {label!r},", "remove it")
    values = [part[key] for key in used[1:] if part.get(key) is not None]
    if not values or any(not isinstance(value, str) or value != values[0] for value in values):
        raise DataError(f"{where} has a content part of type {label!r} without one text; write it into its key text")
    return kind, str(values[0])


def _read_reasoning(turn: Mapping[str, Any], thought: str, where: str) -> str:
    values = {"content": thought} | {key: turn[key] for key in REASONING_KEYS if key in turn}
    for key, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {key} must be a string, not {_kind(value)}")
    texts = {key: str(value) for key, value in values.items() if value}
    if len(set(texts.values())) > 1:
        raise DataError(f"{where} has different reasoning in {' and '.join(texts)}; keep one of them")
    return next(iter(texts.values()), "")


def _read_training(turn: Mapping[str, Any], role: str, where: str) -> tuple[bool, float]:
    """Whether the turn is trained on, and the weight of its loss."""
    flags = {key: turn[key] for key in TRAIN_KEYS if key in turn}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or not 0 <= value <= MAX_WEIGHT:  # NaN is no such number, too
            shown = f"{value!r}"[:MAX_SHOWN]
            raise DataError(f"{where}: {key} must be true, false or a weight from 0 to {MAX_WEIGHT}, not {shown}")
    if role != "assistant":
        if on := [key for key, value in flags.items() if value]:
            raise DataError(
                f"{where} has {on[0]}: {flags[on[0]]}, but only the assistant's turns are trained on; remove it"
            )
        return True, 1.0
    weights = {float(value) for value in flags.values() if not isinstance(value, bool)}
    if len({bool(value) for value in flags.values()}) > 1 or len(weights) > 1:
        both = " and ".join(f"{key}: {json.dumps(value)}" for key, value in flags.items())
        raise DataError(f"{where} has {both}, which contradict each other; keep one of them")
    if not all(flags.values()):
        return False, 1.0
    return True, next(iter(weights), 1.0)


def _read_calls(turn: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    if all(turn.get(key) for key in CALL_KEYS):
        raise DataError(f"{where} has both {' and '.join(CALL_KEYS)}; remove one of them")
    raw = next((turn[key] for key in CALL_KEYS if turn.get(key)), ())
    if isinstance(raw, str):
        return _parse_calls(raw, where)
    return _calls_of(raw, where)


def _parse_calls(text: str, where: str) -> tuple[ToolCall, ...]:
    return _calls_of(_json(text, f"{where}: the tool call"), where)


def _calls_of(raw: object, where: str) -> tuple[ToolCall, ...]:
    calls = raw if isinstance(raw, list | tuple) else [raw]
    return tuple(_read_call(f"{where}, tool call {i}", call) for i, call in enumerate(calls))


def _read_call(where: str, raw: object) -> ToolCall:
    if not isinstance(raw, dict):
        raise DataError(f"{where} must be an object with name and arguments, not {_kind(raw)}")
    kind = raw.get("type") or "function"
    inner = raw.get("function") or raw
    if kind != "function" or not isinstance(inner, dict):
        raise DataError(f"{where} is of type {kind!r}; only functions are supported")
    remedy = "write the parameters into arguments"
    if inner is raw:
        _refuse_others(raw, (*BARE_CALL_KEYS, "function"), where, remedy)
    else:
        _refuse_others(raw, WRAPPED_CALL_KEYS, f"{where}, beside its function,", "move it into the function")
        _refuse_others(inner, FUNCTION_KEYS, f"{where}, in its function,", remedy)
    name, arguments, call_id = inner.get("name"), inner.get("arguments"), raw.get("id") or ""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has no name")
    if not isinstance(call_id, str):
        raise DataError(f"{where}: id must be a string, not {_kind(call_id)}")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise DataError(f"{where}: arguments must be an object, not {_kind(arguments)}")
    if arguments:
        check_writable(arguments, f"{where}: arguments")
    return ToolCall(name, arguments or {}, call_id)


def _refuse_others(value: Mapping[str, Any], known: Sequence[str], where: str, remedy: str) -> None:
    """Raises DataError if an object has a key with a value that is not one of `known`."""
    if others := [key for key, each in value.items() if key not in known and not _is_empty(each) and each != ""]:
        raise DataError(f"{where} has the key {others[0]}, which is not supported; {remedy}")


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except RepeatedKey as err:
        raise DataError(f"{where}: {err}") from None
    except (ValueError, RecursionError) as err:
        raise DataError(f"{where} is not JSON: {err}") from None


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)
