"""Turns a record of any known format into a conversation or plain text. Knows no files, tokens or templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftray.chat import Conversation, Message, read_messages
from ftray.errors import DataError

LOST = ("history", "tools", "functions")  # keys beside the turns that no supported format has


class BadRecord(Exception):
    """A record that cannot be trained on. rule: its short name. The message says what is wrong."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.rule = rule


def read_record(record: Mapping[str, Any], format: str, columns: Mapping[str, str] | None) -> Conversation | str:
    """The conversation of a record, or its plain text. A key `system` beside the messages becomes the first message.

    Args:
        record: The record.
        format: A name of `data.train[].format`. `auto` chooses by the keys.
        columns: Role → column, for the format columns.

    Raises:
        BadRecord: unknown_shape, missing_field, wrong_type, no_answer, bad_turn, lost_field.
    """
    if columns is not None:
        return Conversation(_from_columns(record, columns))
    name = _detect(record) if format == "auto" else format
    if name == "text":
        return _text(record, "text")
    if lost := [key for key in LOST if record.get(key)]:
        raise BadRecord(
            "lost_field", f"it has {lost[0]}, which is not supported; write it into the turns, or remove it"
        )
    return Conversation(_system_turn(record) + _turns_of(record, name))


def _system_turn(record: Mapping[str, Any]) -> tuple[Message, ...]:
    return (Message("system", _text(record, "system")),) if record.get("system") else ()


def _turns_of(record: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    if name == "messages":
        return _turns(record.get("messages"))
    if name == "sharegpt":
        return _from_sharegpt(record.get("conversations"))
    if name == "alpaca":
        question = _text(record, "instruction")
        extra = record.get("input")
        if extra is not None and (not isinstance(extra, str) or extra.strip()):
            question += f"\n\n{_text(record, 'input')}"
        return _pair(question, record, "output")
    return _pair(_text(record, "prompt"), record, "completion")


def _detect(record: Mapping[str, Any]) -> str:
    for keys, name in (
        (("messages",), "messages"),
        (("conversations",), "sharegpt"),
        (("prompt",), "prompt-completion"),
        (("instruction",), "alpaca"),
        (("text",), "text"),
    ):
        if all(k in record for k in keys):
            return name
    shown = ", ".join(sorted(map(str, record))[:8]) or "none"
    raise BadRecord(
        "unknown_shape",
        f"its keys ({shown}) match no known format; give the source columns: {{user: …, assistant: …}}",
    )


def _turns(raw: object) -> tuple[Message, ...]:
    try:
        turns = read_messages(raw)
    except DataError as err:
        raise BadRecord("bad_turn", str(err)) from None
    if not any(t.role == "assistant" for t in turns):
        raise BadRecord("no_answer", "no turn is the assistant's")
    return turns


def _from_sharegpt(raw: object) -> tuple[Message, ...]:
    if not isinstance(raw, list):
        raise BadRecord("bad_turn", "conversations must be a list")
    return _turns(raw)


def _from_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Message, ...]:
    turns = (Message("system", _text(record, columns["system"])),) if "system" in columns else ()
    return turns + _pair(_text(record, columns["user"]), record, columns["assistant"])


def _pair(question: str, record: Mapping[str, Any], answer_key: str) -> tuple[Message, ...]:
    answer = record.get(answer_key)
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise BadRecord("no_answer", f"{answer_key} is missing or empty")
    return Message("user", question), Message("assistant", _text(record, answer_key))


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        raise BadRecord("missing_field", f"{key} is missing")
    if not isinstance(value, str):
        raise BadRecord("wrong_type", f"{key} is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise BadRecord("missing_field", f"{key} is empty")
    return value
