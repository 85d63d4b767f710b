"""Turns a record of any known format into a conversation or plain text. Knows no files, tokens or templates.

Each key of a record is used, a harmless fact about the record (HARMLESS_KEYS), named in the source's `ignore`, or a reason to
reject the record. A key whose value is null or empty counts as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from ftray.chat import Conversation, Message, read_messages, read_tools
from ftray.chat.json_text import RepeatedKey, parse_json
from ftray.config.column_template import ColumnTemplate, parse_template
from ftray.errors import DataError

TURN_KEYS = ("messages", "conversations", "conversation")
PAIR_KEYS = {"prompt-completion": ("prompt", "completion"), "query-response": ("query", "response")}
TOOL_KEYS = ("tools", "functions")
BESIDE_TURNS = frozenset({*TOOL_KEYS, "system"})
SHAPES = dict.fromkeys(TURN_KEYS, "messages") | {
    "prompt": "prompt-completion",
    "query": "query-response",
    "instruction": "alpaca",
    "text": "text",
}
# Facts about a record that no model reads.
HARMLESS_KEYS = frozenset(
    {
        "__index_level_0__", "_id", "author", "category", "conv_id", "conversation_hash", "conversation_id",
        "created", "created_at", "dataset", "dataset_name", "date", "dialog_id", "dialogue_id", "domain",
        "example_id", "file", "file_name", "filename", "hash", "id", "idx", "index", "item_id", "key", "lang",
        "language", "license", "md5", "message_id", "meta", "metadata", "model", "model_name", "num_tokens",
        "num_turns", "origin", "prompt_id", "record_id", "redacted", "row_id", "sample_id", "sha256", "source",
        "split", "subject", "tags", "task", "task_id", "task_type", "timestamp", "token_count", "topic", "turn",
        "uid", "url", "user_id", "uuid", "version",
    }
)  # fmt: skip
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio", "objects")
PREFERENCE_KEYS = ("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages", "ranking")
KEY_CHARS = 60  # of a key in the name of a rule
RATING_KEYS = ("label", "kto_tag")
UNSUPPORTED = {
    **dict.fromkeys(
        MEDIA_KEYS, "but ftray trains on text only, and the answer would be learned without it; remove the record"
    ),
    **dict.fromkeys(
        PREFERENCE_KEYS,
        "but ftray trains on answers, not on preferences; make the good answer the last turn and remove the key",
    ),
    **dict.fromkeys(
        RATING_KEYS,
        "which rates or classifies it; remove records with bad answers, and then the key. For classification, set the "
        "source's columns: {user: …, assistant: label}",
    ),
}


class BadRecord(Exception):
    """A record that cannot be trained on. rule: its short name. The message says what is wrong."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.rule = rule


def read_record(
    record: Mapping[str, Any],
    format: str,
    columns: Mapping[str, str] | None,
    ignore: Collection[str] = (),
    tools: tuple[dict[str, Any], ...] = (),
    used_elsewhere: Collection[str] = (),
) -> Conversation | str:
    """The conversation of a record, or its plain text.

    Args:
        record: The record.
        format: A name of `data.train[].format`. `auto` chooses by the keys.
        columns: Role → column or template, for the format columns.
        ignore: Keys of the record and of its turns that are left out.
        tools: The tools of a record that has none of its own.
        used_elsewhere: Keys that have an effect outside the conversation, the class of the split for example.

    Raises:
        BadRecord: unknown_shape, missing_field, wrong_type, no_answer, bad_turn, or unused_key:<key>.
    """
    if columns is not None:
        return _from_columns(record, columns, ignore, tools)
    if ignore:
        record = {key: value for key, value in record.items() if key not in ignore}
    present = {key: value for key, value in record.items() if not _is_empty(value)}
    for key in present:
        if key in UNSUPPORTED and key not in used_elsewhere:
            raise _unused(key, UNSUPPORTED[key])
    name = _detect(present) or _detect(record) if format == "auto" else format
    if name is None:
        raise BadRecord(
            "unknown_shape",
            f"its keys ({_shown(record)}) match no known format; give the source columns: {{user: …, assistant: …}}",
        )
    if name == "text":
        _check_used(present, ("text",), used_elsewhere)
        if tools:
            raise BadRecord("wrong_type", "it is plain text, but its source has tools; remove one of them")
        return _text(record, "text")
    messages, used = _turns_of(record, name, ignore)
    messages = _with_system(record, messages)
    if present.get("prompt") == next((m.content for m in messages if m.role == "user"), None):
        used.add("prompt")  # it only repeats the first question
    _check_used(present, used | BESIDE_TURNS, used_elsewhere)
    return Conversation(messages, _tools_of(record, present, tools))


def used_columns(columns: Mapping[str, str], only_required: bool = False) -> frozenset[str]:
    """The columns that a value of `data.train[].columns` names. only_required: without those in brackets."""
    parts = [part for value in columns.values() for part in parse_template(value).parts]
    return frozenset(name for part in parts if not (only_required and part.is_optional) for name in part.columns)


def optional_columns(columns: Mapping[str, str]) -> frozenset[str]:
    """The columns that a value of `data.train[].columns` names, but that a record may lack: those in brackets, and of tools."""
    others = {role: value for role, value in columns.items() if role != "tools"}
    return used_columns(columns) - used_columns(others, only_required=True)


def missing_columns(
    columns: Mapping[str, str], existing: Collection[str], path: str, records: str = "record"
) -> list[str]:
    """A sentence on each optional column that no record has: its name is misspelled, or it is in the way.

    Args:
        columns: Role → column or template.
        existing: The keys of all records.
        path: The source, for the sentence.
        records: What `existing` was read from, in the singular.
    """
    shown = ", ".join(sorted(existing)[:8])
    return [
        f"{path}: no {records} has the column {name!r}, which its columns name; the records have {shown}. Correct the "
        "name, or remove it"
        for name in sorted(optional_columns(columns) - set(existing))
    ]


def _check_used(present: Mapping[str, Any], used: Collection[str], used_elsewhere: Collection[str]) -> None:
    for key in present:
        if key not in used and key not in HARMLESS_KEYS and key not in used_elsewhere:
            raise _unused(key, "which has no effect in this format")


def _unused(key: str, reason: str) -> BadRecord:
    name = "".join(c if c.isprintable() else "\ufffd" for c in key[:KEY_CHARS])
    return BadRecord(f"unused_key:{name}", f"it has the key {name or repr(name)}, {reason}")


def _is_empty(value: object) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list | dict) and not value)
    )


def _detect(keys: Collection[str]) -> str | None:
    return next((name for key, name in SHAPES.items() if key in keys), None)


def _turns_of(record: Mapping[str, Any], name: str, ignore: Collection[str]) -> tuple[tuple[Message, ...], set[str]]:
    """The messages of a record, and the keys that hold them."""
    if name in ("messages", "sharegpt"):
        keys = [key for key in TURN_KEYS if not _is_empty(record.get(key))]
        if not keys:
            raise BadRecord("missing_field", f"it has none of the keys {', '.join(TURN_KEYS)}")
        first = record[keys[0]]
        return _turns(first, keys[0], ignore), {key for key in keys if record[key] == first}
    if name == "alpaca":
        question = _text(record, "instruction")
        if not _is_empty(record.get("input")):
            question += f"\n\n{_text(record, 'input')}"
        used = {"instruction", "input", "output", "history"}
        return (*_history(record), Message("user", question), _answer(record, "output")), used
    prompt, completion = PAIR_KEYS[name]
    return _prompt(record, prompt, ignore) + _completion(record, completion, ignore), {prompt, completion, "history"}


def _prompt(record: Mapping[str, Any], key: str, ignore: Collection[str]) -> tuple[Message, ...]:
    """The turns before the answer. They are context: answers among them are not trained on, except those of `history`."""
    raw = _turns_or_text(record.get(key))
    if isinstance(raw, list) and raw:
        return _history(record) + tuple(
            replace(m, train=False) if m.role == "assistant" else m for m in _read(raw, key, ignore)
        )
    return (*_history(record), Message("user", _text(record, key)))


def _completion(record: Mapping[str, Any], key: str, ignore: Collection[str]) -> tuple[Message, ...]:
    raw = _turns_or_text(record.get(key))
    return _turns(raw, key, ignore) if isinstance(raw, list) and raw else (_answer(record, key),)


def _history(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Earlier turns as pairs of question and answer."""
    raw = _from_json(record.get("history"))
    if _is_empty(raw):
        return ()
    messages: list[Message] = []
    for pair in raw if isinstance(raw, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRecord("wrong_type", "history must be a list of pairs [question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return tuple(messages)


def _turns(raw: object, key: str, ignore: Collection[str]) -> tuple[Message, ...]:
    turns = _read(raw, key, ignore)
    if not any(t.role == "assistant" for t in turns):
        raise BadRecord("no_answer", "no turn is the assistant's")
    return turns


def _read(raw: object, key: str, ignore: Collection[str]) -> tuple[Message, ...]:
    raw = _from_json(raw)
    if not isinstance(raw, list):
        raise BadRecord("bad_turn", f"{key} must be a list of turns")
    turns = raw
    if raw and isinstance(raw[0], dict) and "human" in raw[0]:
        turns = [turn for item in raw for turn in _single_turns(item)]
    if ignore:
        turns = [{k: v for k, v in t.items() if k not in ignore} if isinstance(t, dict) else t for t in turns]
    try:
        return read_messages(turns)
    except DataError as err:
        raise BadRecord("bad_turn", str(err)) from None


def _single_turns(item: object) -> list[object]:
    """The turns of an item; ms-swift has an older shape with question and answer in one item."""
    if isinstance(item, dict) and item and item.keys() <= {"human", "assistant"}:
        return [{"role": role, "content": item[role]} for role in ("human", "assistant") if role in item]
    return [item]


def _from_json(raw: object) -> object:
    """A list that was stored as JSON, as tables without nested columns do, or the value itself."""
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        try:
            return parse_json(raw)
        except RepeatedKey as err:
            raise BadRecord("repeated_key", str(err)) from None
        except (ValueError, RecursionError):
            return raw
    return raw


def _turns_or_text(raw: object) -> object:
    """The turns in a text that holds them as JSON, or the value itself: an answer may be a JSON list of other objects."""
    if not isinstance(raw, str) or not raw.lstrip().startswith("["):
        return raw
    try:
        value = parse_json(raw)
    except (RepeatedKey, ValueError, RecursionError):
        return raw
    is_turns = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    return value if is_turns and all("role" in each or "from" in each for each in value) else raw


def _with_system(record: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with the text of the key `system` first, unless they begin with it."""
    if _is_empty(record.get("system")):
        return messages
    text = _text(record, "system")
    if messages[0].role not in ("system", "developer"):
        return (Message("system", text), *messages)
    if messages[0].content.strip() != text.strip():
        raise BadRecord("bad_turn", "it has the key system and a system turn with another text; keep one of them")
    return messages


def _tools_of(
    record: Mapping[str, Any], present: Mapping[str, Any], default: tuple[dict[str, Any], ...]
) -> tuple[dict[str, Any], ...]:
    """The record's own tools, or else the default. An empty list means that it has none."""
    if BESIDE_TURNS.isdisjoint(record):
        return default
    own = [key for key in TOOL_KEYS if key in present and not _is_absent(record[key])] or [
        key for key in TOOL_KEYS if not _is_absent(record.get(key))
    ]
    if len(own) > 1 and record[own[0]] != record[own[1]]:
        raise BadRecord("bad_tools", "it has both tools and functions; remove one of them")
    return _tools(record[own[0]]) if own else default


def _is_absent(raw: object) -> bool:
    """Whether tools are not there, as opposed to an empty list. A table of texts has an empty text or null for them."""
    return raw is None or (isinstance(raw, str) and raw.strip() in ("", "null"))


def _tools(raw: object) -> tuple[dict[str, Any], ...]:
    try:
        return read_tools(raw)
    except DataError as err:
        raise BadRecord("bad_tools", str(err)) from None


def _from_columns(
    record: Mapping[str, Any],
    columns: Mapping[str, str],
    ignore: Collection[str],
    tools: tuple[dict[str, Any], ...],
) -> Conversation:
    templates = {role: parse_template(value) for role, value in columns.items()}
    if "messages" in templates:
        (key,) = templates["messages"].columns
        messages = _turns(record.get(key), key, ignore)
    else:
        question = _fill(record, templates["user"])
        if not question.strip():
            raise BadRecord("missing_field", f"the user text is empty: {columns['user']!r} names no column with a text")
        messages = (Message("user", question), _filled_answer(record, templates["assistant"]))
    if "system" in templates:
        _check_present(record, templates["system"])
        rules = _fill(record, templates["system"], is_optional=True)
        messages = _with_system({"system": rules}, messages)
    if "tools" in templates:
        (key,) = templates["tools"].columns
        tools = tools if _is_absent(record.get(key)) else _tools(record[key])
    return Conversation(messages, tools)


def _filled_answer(record: Mapping[str, Any], template: ColumnTemplate) -> Message:
    for key in template.columns if template.is_name else ():
        if _is_empty(record.get(key)):
            raise _no_answer(record, key)
    return Message("assistant", _fill(record, template))


def _check_present(record: Mapping[str, Any], template: ColumnTemplate) -> None:
    """The system text may be empty, but a column that the record does not have at all is a misspelled name."""
    if template.is_name and template.columns[0] not in record:
        raise _missing(record, template.columns[0])


def _fill(record: Mapping[str, Any], template: ColumnTemplate, is_optional: bool = False) -> str:
    def optional(key: str) -> str:
        return "" if _is_empty(record.get(key)) else _plain(record, key)

    required: Callable[[str], str] = optional if is_optional and template.is_name else lambda key: _plain(record, key)
    return template.fill(required, optional)


def _plain(record: Mapping[str, Any], key: str) -> str:
    """The text of a column. A whole number is a text too, so that numbered classes need no conversion."""
    value = record.get(key)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(record, key)


def _answer(record: Mapping[str, Any], key: str) -> Message:
    if _is_empty(record.get(key)):
        raise _no_answer(record, key)
    return Message("assistant", _text(record, key))


def _no_answer(record: Mapping[str, Any], key: str) -> BadRecord:
    if key in record:
        return BadRecord("no_answer", f"{key} is empty")
    return BadRecord("no_answer", f"{key} is missing; the record has {_shown(record)}")


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        raise _missing(record, key)
    if not isinstance(value, str):
        raise BadRecord("wrong_type", f"{key} is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise BadRecord("missing_field", f"{key} is empty")
    return value


def _missing(record: Mapping[str, Any], key: str) -> BadRecord:
    reason = f"{key} is missing"
    return BadRecord("missing_field", reason if key in record else f"{reason}; the record has {_shown(record)}")


def _shown(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, record))[:8]) or "none"
