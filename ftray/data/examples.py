"""Turns a raw record into an example, or into a quarantine entry that says why not. Knows no sequences, order or Ray.

Every record becomes exactly one of the two: no record is silently dropped, truncated or left without trained tokens.

A record belongs to the eval set if the first 64 bits of its hash (or its group's hash) are below `fraction`, independent of
all other records. A class may end up without an eval record that way; then `labels.pick_substitutes` selects one, and the
chunk's descriptor names it in `moved`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ftray.chat import ChatFormat, Conversation, Encoded
from ftray.chat.json_text import RepeatedKey, parse_json
from ftray.data.checks.labels import check_labels
from ftray.data.formats import HARMLESS_KEYS, BadRecord, optional_columns, read_record, used_columns
from ftray.data.sources import Chunk, RawRecord, read_chunk
from ftray.data.too_long import RecordPart, num_trained, split, truncate
from ftray.errors import DataError

EXCERPT_CHARS, DETAIL_CHARS = 160, 400
MAX_BAD_RECORDS = 500_000
WINDOW = 1024  # records that are tokenized together


@dataclass(frozen=True)
class Example:
    """A record that is ready for packing.

    Attributes:
        position: Its position in the chunk.
        encoded: Its token ids and loss mask.
        conversation: None for plain text.
        text: None for conversations.
        digest: 64 bits of the record's hash, if the split needs it.
        stratum: Its class, if the split needs it.
        slice: Its value in the column `evaluate.slices`, as text.
        part: The number of this part of a record that `data.too_long` shortens, else 0.
        is_cut: Whether it is a text that does not end with the end token.
        num_lost: Trained tokens of the record that are in none of its parts. Only its first part has the number.
        keys: The keys of the record, if its source names optional columns.
    """

    position: int
    encoded: Encoded
    conversation: Conversation | None
    text: str | None = None
    digest: int = 0
    stratum: str | None = None
    slice: str | None = None
    part: int = 0
    is_cut: bool = False
    num_lost: int = 0
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quarantined:
    """A bad record: its place, the broken rule, what is wrong, its beginning, and a remedy."""

    uri: str
    position: int
    rule: str
    detail: str
    excerpt: str
    fix: str = ""


@dataclass(frozen=True)
class Rules:
    """Requirements on the records of a source.

    Attributes:
        part: `train` or `eval` if records are split by hash, else None for all.
        stratify: Column of the split's classes.
        group: Column of the split's groups.
        labels: The only allowed answers.
        slices: A column that examples keep.
        ignore: Keys of records and turns that are left out.
        tools: The tools of records that have none of their own.
        too_long: `data.too_long`.
        joins_text: Whether texts may be of any length, because they are cut where a sequence is full.
    """

    max_seq_len: int
    format: str
    columns: dict[str, str] | None
    eval_fraction: float | None
    part: str | None
    stratify: str | None = None
    group: str | None = None
    labels: tuple[str, ...] | None = None
    slices: str | None = None
    ignore: frozenset[str] = frozenset()
    tools: tuple[dict[str, Any], ...] = ()
    too_long: str = "error"
    joins_text: bool = False

    @cached_property
    def used_elsewhere(self) -> frozenset[str]:
        """Columns that have an effect outside the conversation."""
        return frozenset(name for name in (self.stratify, self.group, self.slices) if name is not None)

    @cached_property
    def _used(self) -> frozenset[str] | None:
        return None if self.columns is None else used_columns(self.columns) | self.used_elsewhere

    @cached_property
    def required(self) -> frozenset[str]:
        """Columns that every table must have, because `columns` names them outside brackets."""
        return frozenset() if self.columns is None else used_columns(self.columns, only_required=True)

    @cached_property
    def optional(self) -> frozenset[str]:
        """Columns that `columns` names and that a record may lack."""
        return frozenset() if self.columns is None else optional_columns(self.columns)

    @property
    def hashes(self) -> bool:
        """Whether records are hashed, for the split or its classes."""
        return self.eval_fraction is not None or self.stratify is not None

    def needs(self, column: str) -> bool:
        """Whether a key of a record can have an effect, or be a reason to reject the record."""
        if self._used is not None:
            return column in self._used
        return column in self.used_elsewhere or (column not in HARMLESS_KEYS and column not in self.ignore)


FIXES = {
    "bad_tools": "write the tools as OpenAI's API has them",
    "bad_turn": "correct this turn",
    "dropped": "no action needed if it is a duplicate; otherwise set its rule in data.clean to report",
    "fractional_weight": "set the weight to 0 or 1",
    "invalid_json": "write one JSON object per line",
    "invalid_utf8": "save the file as UTF-8",
    "missing_field": "fill in the field, or remove the record",
    "no_answer": "add the answer, or name its column in the source's columns",
    "not_an_object": "write one JSON object per line",
    "no_trained_tokens": "give it an answer of at least two tokens, or remove it",
    "repeated_key": "keep one of the values",
    "too_long": "raise data.max_seq_len, or set data.too_long to quarantine, split or truncate",
    "too_many_fields": "put quotes around fields that contain commas",
    "unknown_label": "correct the answer, or add it to data.labels",
    "unknown_shape": "give the source columns: {user: …, assistant: …}, or a format",
    "unused_key": "remove the key, or name it in the source's ignore: [key]",
    "wrong_type": "write the field as a string",
}


def read_examples(chunk: Chunk, chat: ChatFormat, rules: Rules) -> Iterator[Example | Quarantined]:
    """Every record of a chunk that belongs to the part, in file order, as an example or a quarantine entry.

    Unreadable records belong to the training part, so that each record counts in exactly one part.

    Raises:
        DataError: The chunk cannot be read, or has more than MAX_BAD_RECORDS bad records, which are all kept in memory.
    """
    bad = 0
    for item in _read_examples(chunk, chat, rules):
        bad += isinstance(item, Quarantined)
        if bad > MAX_BAD_RECORDS and isinstance(item, Quarantined):
            raise DataError(
                f"{chunk.name} has more than {MAX_BAD_RECORDS} bad records in one piece, the last at {item.position}: "
                f"{item.detail}; {item.fix}"
            )
        yield item


def _read_examples(chunk: Chunk, chat: ChatFormat, rules: Rules) -> Iterator[Example | Quarantined]:
    dropped, moved = frozenset(chunk.dropped), frozenset(chunk.moved)
    raws = read_chunk(chunk, rules.needs, rules.required)
    while window := list(islice(raws, WINDOW)):
        drafts: list[_Draft | Quarantined] = []
        for raw in window:
            part = "train"
            try:
                if raw.position in dropped:
                    raise BadRecord("dropped", "removed by data.clean")
                record = parse_record(raw)
                used = record
                if rules.hashes:
                    used = {key: value for key, value in record.items() if rules.needs(key)}
                part = split_part(used, rules.eval_fraction, rules.group)
                if raw.position in moved:
                    part = "eval" if part == "train" else "train"
                if rules.part in (None, part):
                    drafts.append(_read(raw, record, used, rules))
            except BadRecord as bad:
                if rules.part in (None, part):
                    drafts.append(_quarantine(chunk, raw, bad))
        encoded = iter(chat.encode_examples([d.conversation for d in drafts if isinstance(d, _Draft)]))
        for draft in drafts:
            if isinstance(draft, Quarantined):
                yield draft
                continue
            try:
                yield from _finish(draft, next(encoded), rules, chat)
            except BadRecord as bad:
                yield _quarantine(chunk, draft.raw, bad)


def split_part(record: dict[str, Any], fraction: float | None, group: str | None = None) -> str:
    """`eval` for that fraction of records, else `train`, by a hash of the record's content, never by its place.

    Args:
        record: The record.
        fraction: data.eval.fraction.
        group: A column. Records with the same value go to the same side.

    Raises:
        BadRecord: The column is missing.
    """
    if fraction is None:
        return "train"
    if group is not None and record.get(group) is None:
        raise BadRecord("missing_field", f"{group} is missing, the column that data.eval.group names")
    digest = content_hash(record if group is None else record[group])
    return "eval" if digest < fraction * 2**64 else "train"


def content_hash(value: object) -> int:
    """64 bits of blake2b over a value as JSON with sorted keys. Raises BadRecord if JSON cannot represent it."""
    if isinstance(value, dict):  # a table fills missing fields in with null
        value = {key: each for key, each in value.items() if each is not None}
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError) as err:  # nested too deeply, or keys that are not strings
        raise BadRecord("invalid_json", f"cannot be written as JSON: {err}") from None
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def parse_record(raw: RawRecord) -> dict[str, Any]:
    """The JSON object of a raw record. Raises BadRecord."""
    if isinstance(raw.value, dict):
        if None in raw.value:  # csv's key for fields without a column
            raise BadRecord("too_many_fields", "the line has more fields than the header; put quotes around commas")
        return raw.value
    try:
        record = parse_json(raw.value.decode("utf-8"))
    except RepeatedKey as err:
        raise BadRecord("repeated_key", str(err)) from None
    except UnicodeDecodeError as err:
        raise BadRecord("invalid_utf8", f"byte {err.start} is not UTF-8") from None
    except (ValueError, RecursionError) as err:
        raise BadRecord("invalid_json", f"not JSON: {err}") from None
    if not isinstance(record, dict):
        raise BadRecord("not_an_object", f"a record must be a JSON object, not a {type(record).__name__}")
    return record


class _Draft(NamedTuple):
    """A record that was read, but not tokenized yet."""

    raw: RawRecord
    conversation: Conversation | str
    digest: int
    stratum: str | None
    slice: str | None
    keys: tuple[str, ...]


def _read(raw: RawRecord, record: dict[str, Any], used: dict[str, Any], rules: Rules) -> _Draft:
    """Reads a record. used: the part of it that can have an effect, which is what its hash covers."""
    digest, stratum = 0, None
    if rules.stratify is not None:
        if record.get(rules.stratify) is None:
            raise BadRecord("missing_field", f"{rules.stratify} is missing, the column that data.eval.stratify names")
        digest, stratum = content_hash(used), str(record[rules.stratify])
    conversation = read_record(record, rules.format, rules.columns, rules.ignore, rules.tools, rules.used_elsewhere)
    for i, message in enumerate(() if isinstance(conversation, str) else conversation.messages):
        if message.weight != 1 and message.train:
            raise BadRecord(
                "fractional_weight",
                f"turn {i} ({message.role}) has the weight {message.weight:g}; only 0 and 1 are supported",
            )
    if rules.labels is not None:
        check_labels(conversation, rules.labels)
    value = record.get(rules.slices) if rules.slices is not None else None
    keys = tuple(record) if rules.optional else ()
    return _Draft(raw, conversation, digest, stratum, None if value is None else str(value), keys)


def _finish(draft: _Draft, encoded: Encoded | DataError, rules: Rules, chat: ChatFormat) -> list[Example]:
    if isinstance(encoded, DataError):
        raise BadRecord("bad_turn", str(encoded))
    raw = draft.conversation
    parts = [RecordPart(raw, encoded)]
    if encoded.longest > rules.max_seq_len and not (rules.joins_text and isinstance(raw, str)):
        shorten = {"split": split, "truncate": truncate}.get(rules.too_long)
        parts = shorten(raw, encoded, chat, rules.max_seq_len) if shorten else []
        if not parts:
            reason = ", even one question with its answer" if shorten else ""
            limit = f"more than data.max_seq_len ({rules.max_seq_len})"
            raise BadRecord("too_long", f"{encoded.longest} tokens, {limit}{reason}")
    if not np.any(encoded.loss_mask[1:]):
        raise BadRecord("no_trained_tokens", "it has no token to train on")
    is_whole = parts[0].encoded is encoded
    lost = 0 if is_whole else num_trained(encoded) - sum(num_trained(part.encoded) for part in parts)
    examples = []
    for number, part in enumerate(parts):
        conversation, text = (None, part.content) if isinstance(part.content, str) else (part.content, None)
        kept = (draft.digest, draft.stratum, draft.slice, number, part.is_cut, 0 if number else lost, draft.keys)
        examples.append(Example(draft.raw.position, part.encoded, conversation, text, *kept))
    return examples


def _quarantine(chunk: Chunk, raw: RawRecord, bad: BadRecord) -> Quarantined:
    detail, fix = _clip(str(bad), DETAIL_CHARS), FIXES.get(bad.rule.partition(":")[0], "correct it, or remove it")
    piece, position = chunk.locate(raw.position)
    return Quarantined(piece.uri, position, bad.rule, detail, _excerpt(raw.value), fix)


def _excerpt(value: bytes | dict[str, Any]) -> str:
    if isinstance(value, bytes):
        return _clip(value[: 4 * EXCERPT_CHARS + 4].decode("utf-8", "replace"))
    try:
        return _clip(json.dumps(value, ensure_ascii=False, default=str))
    except (RecursionError, TypeError, ValueError):
        return ""


def _clip(text: str, num_chars: int = EXCERPT_CHARS) -> str:
    """The beginning of a text, safe to write to any file."""
    short = text if len(text) <= num_chars else text[:num_chars] + "…"
    return short.encode("utf-8", "backslashreplace").decode()
