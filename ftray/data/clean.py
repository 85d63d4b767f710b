"""Raw record → example, or a quarantine entry that says why not. Knows no rows, order or Ray.

Nothing is dropped, cut or left without supervised tokens in silence: every record becomes exactly one of the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftray.chat import ChatFormat, Encoded, Message
from ftray.data.formats import BadRecord, read_record
from ftray.data.sources import Chunk, RawRecord, read_chunk
from ftray.errors import DataError

EXCERPT_CHARS, DETAIL_CHARS = 160, 400


@dataclass(frozen=True)
class Example:
    """A record ready to be packed. position: its identity in the shard. messages: None for plain text."""

    position: int
    encoded: Encoded
    messages: list[Message] | None


@dataclass(frozen=True)
class Quarantined:
    """A bad record: where it is, which rule it broke, what is wrong, and its beginning."""

    uri: str
    position: int
    rule: str
    detail: str
    excerpt: str


@dataclass(frozen=True)
class Rules:
    """What a record must keep to. part: `train` or `eval` where records are split by hash, else None for all."""

    max_seq_len: int
    format: str
    columns: dict[str, str] | None
    eval_fraction: float | None
    part: str | None


def read_examples(chunk: Chunk, chat: ChatFormat, rules: Rules) -> Iterator[Example | Quarantined]:
    """Every record of a chunk that belongs to the part, in file order, as an example or a quarantine entry.

    What can't be read as a record belongs to the training part. So each record is counted in exactly one part.
    """
    for raw in read_chunk(chunk):
        part = "train"
        try:
            record = _parse(raw)
            part = split_part(record, rules.eval_fraction)
            if rules.part in (None, part):
                yield _encode(raw.position, record, chat, rules)
        except BadRecord as bad:
            if rules.part not in (None, part):
                continue
            yield Quarantined(chunk.uri, raw.position, bad.rule, _clip(str(bad), DETAIL_CHARS), _excerpt(raw.value))


def split_part(record: dict[str, Any], fraction: float | None) -> str:
    """`eval` for that fraction of records, else `train`: by a hash of the record's content, never by its place."""
    if fraction is None:
        return "train"
    try:
        text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError) as err:  # nested too deeply, or keys that are no text
        raise BadRecord("invalid_json", f"can't be written as JSON: {err}") from None
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") < fraction * 2**64 else "train"


def _parse(raw: RawRecord) -> dict[str, Any]:
    if isinstance(raw.value, dict):
        if None in raw.value:  # so csv calls what has no column
            raise BadRecord("too_many_fields", "the line has more fields than the header; put quotes around commas")
        return raw.value
    try:
        record = json.loads(raw.value.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise BadRecord("invalid_utf8", f"byte {err.start} is not UTF-8") from None
    except (ValueError, RecursionError) as err:
        raise BadRecord("invalid_json", f"not JSON: {err}") from None
    if not isinstance(record, dict):
        raise BadRecord("not_an_object", f"a record is a JSON object, this is a {type(record).__name__}")
    return record


def _encode(position: int, record: dict[str, Any], chat: ChatFormat, rules: Rules) -> Example:
    conversation = read_record(record, rules.format, rules.columns)
    try:
        if isinstance(conversation, str):
            encoded, messages = chat.encode_text(conversation), None
        else:
            encoded, messages = chat.encode_example(conversation), conversation
    except DataError as err:
        raise BadRecord("bad_turn", str(err)) from None
    num_tokens = len(encoded.input_ids)
    if num_tokens > rules.max_seq_len:
        raise BadRecord("too_long", f"{num_tokens} tokens, more than data.max_seq_len ({rules.max_seq_len})")
    if not any(encoded.loss_mask[1:]):
        raise BadRecord("nothing_supervised", "no token of it is under the loss")
    return Example(position, encoded, messages)


def _excerpt(value: bytes | dict[str, Any]) -> str:
    if isinstance(value, bytes):
        return _clip(value[: 4 * EXCERPT_CHARS + 4].decode("utf-8", "replace"))
    try:
        return _clip(json.dumps(value, ensure_ascii=False, default=str))
    except (RecursionError, TypeError, ValueError):
        return ""


def _clip(text: str, num_chars: int = EXCERPT_CHARS) -> str:
    """The beginning of a text, as text that can be written to any file."""
    short = text if len(text) <= num_chars else text[:num_chars] + "…"
    return short.encode("utf-8", "backslashreplace").decode()
