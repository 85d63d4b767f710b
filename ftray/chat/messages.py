"""The messages of a conversation. Knows no template and no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from ftray.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One message. `train` matters in assistant messages only: False excludes the message from the loss."""

    role: str
    content: str
    train: bool = True


def read_messages(raw: object) -> list[Message]:
    """Reads OpenAI-style messages, `[{"role": …, "content": …, "train": …?}]`. Raises DataError naming the wrong turn."""
    if not isinstance(raw, list) or not raw:
        raise DataError("messages must be a list with at least one turn")
    return [_read_turn(i, turn) for i, turn in enumerate(raw)]


def _read_turn(i: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"turn {i} must be an object with role and content")
    role, content = turn.get("role"), turn.get("content")
    train = turn.get("train", turn.get("weight") != 0)  # OpenAI's files exclude a message with `weight: 0`
    if role not in ROLES:
        raise DataError(f"turn {i} has the role {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"turn {i} ({role}) has no text; content must be a string")
    if not isinstance(train, bool):
        raise DataError(f"turn {i}: train must be true or false")
    if unsupported := [key for key in ("tool_calls", "function_call", "reasoning_content") if turn.get(key)]:
        raise DataError(f"turn {i} ({role}) has {unsupported[0]}, which is not supported; write it into the content")
    return Message(role, content, train)
