"""What a data set holds, from a sample of its records: format, task, labels, lengths. Needs neither Ray nor torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from ftray.chat import Conversation
from ftray.data.examples import parse_record
from ftray.data.formats import MEDIA_KEYS, PREFERENCE_KEYS, RATING_KEYS, BadRecord, read_record
from ftray.data.sources import RawRecord, Shard, cut_shard, line_number, list_shards, read_chunk
from ftray.errors import ConfigError, DataError

Task = Literal["chat", "classify", "summarize", "extract", "tools", "pretrain"]
TASKS: tuple[Task, ...] = ("chat", "classify", "summarize", "extract", "tools", "pretrain")
MAX_SAMPLE = 2000  # records
MAX_SHARDS = 20  # of which records are read
CHUNK_BYTES = 4 << 20
MAX_LABELS, MAX_LABEL_CHARS = 200, 60
SUMMARY_CHARS, SUMMARY_RATIO = 400, 3.0  # texts of a summarization are longer, and this many times their summaries
# Names of columns by role, the more specific ones first.
USER_COLUMNS = (
    "question", "query", "instruction", "input", "ticket", "document", "article", "review", "passage", "sentence",
    "utterance", "message", "content", "prompt", "source", "title", "text",
)  # fmt: skip
ANSWER_COLUMNS = (
    "answer", "response", "reply", "output", "summary", "highlights", "completion", "label_text", "label", "category",
    "intent", "class", "sentiment", "target", "sql",
)  # fmt: skip


@dataclass(frozen=True)
class SourceProfile:
    """What a sample of a source says about it.

    Attributes:
        path: The source.
        num_files: Its data files.
        num_records: Records, estimated from the sample's size if `is_exact` is False.
        task: The task that the records look like.
        columns: Role → column, if no known format fits.
        ignore: Keys that no format uses.
        labels: The answers of a classification, sorted.
        samples: The sampled records, as conversations or plain texts.
    """

    path: str
    num_files: int
    num_records: int
    is_exact: bool
    task: Task
    columns: dict[str, str] | None
    ignore: tuple[str, ...]
    labels: tuple[str, ...]
    samples: tuple[Conversation | str, ...]


def profile_source(path: str, task: Task | None = None) -> SourceProfile:
    """Reads a sample of a source.

    Args:
        path: As in `data.train[].path`.
        task: The task, if the user names it.

    Raises:
        DataError: There is nothing to read, or a record cannot be used.
        ConfigError: The records do not fit the named task.
    """
    shards = list_shards(path, "the path")
    raws, num_bytes, is_whole = _sample(shards)
    if not raws:
        raise DataError(f"{path} has no record; add records, or correct the path")
    records = [(shard, raw, _parse(shard, raw)) for shard, raw in raws]
    first = records[0][2]
    columns, ignore = _columns_of(first), _unused_keys(first)
    samples = tuple(_read(shard, raw, record, columns, ignore) for shard, raw, record in records)
    total_bytes = sum(shard.size_bytes for shard in shards)
    num_records = len(records) if is_whole else max(len(records), round(len(records) * total_bytes / max(1, num_bytes)))
    answers = [_answer_of(sample) for sample in samples if isinstance(sample, Conversation)]
    labels = _labels_of(answers)
    task = _checked(task, path, samples, answers, labels) if task else _task_of(samples, answers, labels)
    return SourceProfile(
        path=path,
        num_files=len(shards),
        num_records=num_records,
        is_exact=is_whole,
        task=task,
        columns=columns,
        ignore=ignore,
        labels=labels if task == "classify" else (),
        samples=samples,
    )


def _sample(shards: Sequence[Shard]) -> tuple[list[tuple[Shard, RawRecord]], int, bool]:
    """Up to MAX_SAMPLE records of up to MAX_SHARDS files, their size in bytes, and whether they are all there are."""
    step = max(1, len(shards) // MAX_SHARDS)
    picked = list(shards)[::step][:MAX_SHARDS]
    most = -(-MAX_SAMPLE // len(picked))
    raws: list[tuple[Shard, RawRecord]] = []
    num_bytes, is_whole = 0, len(picked) == len(shards)
    for shard in picked:
        read = list(islice(_raw_records(shard), most + 1))
        is_whole &= len(read) <= most
        raws += [(shard, raw) for raw in read[:most]]
        if len(read) <= most:
            num_bytes += shard.size_bytes
        else:
            num_bytes += sum(_size(raw) for raw in read[:most])
    return raws, num_bytes, is_whole


def _raw_records(shard: Shard) -> Iterator[RawRecord]:
    for chunk in cut_shard(shard, 0, CHUNK_BYTES):
        yield from read_chunk(chunk)


def _size(raw: RawRecord) -> int:
    if isinstance(raw.value, bytes):
        return len(raw.value) + 1
    return len(json.dumps(raw.value, ensure_ascii=False, default=str).encode())


def _parse(shard: Shard, raw: RawRecord) -> dict[str, Any]:
    try:
        return parse_record(raw)
    except BadRecord as bad:
        raise DataError(f"{_place(shard, raw)}: {bad}") from None


def _read(
    shard: Shard, raw: RawRecord, record: dict[str, Any], columns: dict[str, str] | None, ignore: tuple[str, ...]
) -> Conversation | str:
    try:
        return read_record(record, "auto", columns, ignore)
    except BadRecord as bad:
        raise DataError(f"{_place(shard, raw)}: {bad}") from None


def _place(shard: Shard, raw: RawRecord) -> str:
    line = line_number(shard.uri, raw.position)
    return f"{shard.uri}, {f'line {line}' if line else f'record {raw.position}'}"


def _columns_of(record: Mapping[str, Any]) -> dict[str, str] | None:
    """The columns of question and answer, if the record has no known format but columns with telling names."""
    try:
        read_record(record, "auto", None, _unused_keys(record))
        return None
    except BadRecord:
        texts = {key for key, value in record.items() if isinstance(value, str) and value.strip()}
        answer = next((name for name in ANSWER_COLUMNS if name in texts), None)
        question = next((name for name in USER_COLUMNS if name in texts and name != answer), None)
        if answer is None or question is None:
            return None
        columns = {"user": question, "assistant": answer}
        return {"system": "system", **columns} if "system" in texts else columns


def _unused_keys(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys that make a record of a known format unusable although its conversation is whole."""
    unused: list[str] = []
    while len(unused) < len(record):
        try:
            read_record(record, "auto", None, unused)
            break
        except BadRecord as bad:
            rule, _, key = bad.rule.partition(":")
            if rule != "unused_key" or key not in record or key in (*MEDIA_KEYS, *PREFERENCE_KEYS, *RATING_KEYS):
                break  # the record is not whole without it
            unused.append(key)
    return tuple(unused)


def _answer_of(conversation: Conversation) -> str:
    return next((m.content for m in reversed(conversation.messages) if m.role == "assistant"), "")


def _labels_of(answers: Sequence[str]) -> tuple[str, ...]:
    """The answers, if there are few different short ones and each comes again."""
    counts = Counter(answer.strip() for answer in answers)
    is_few = 2 <= len(counts) <= min(MAX_LABELS, len(answers) // 3)
    is_short = all(0 < len(label) <= MAX_LABEL_CHARS and "\n" not in label for label in counts)
    return tuple(sorted(counts)) if is_few and is_short else ()


def _task_of(samples: Sequence[Conversation | str], answers: Sequence[str], labels: Sequence[str]) -> Task:
    if any(isinstance(sample, str) for sample in samples):
        return "pretrain"
    conversations = [sample for sample in samples if isinstance(sample, Conversation)]
    if any(message.tool_calls for conversation in conversations for message in conversation.messages):
        return "tools"
    if labels:
        return "classify"
    if answers and all(is_json_object(answer) for answer in answers):
        return "extract"
    if _looks_like_summaries(conversations, answers):
        return "summarize"
    return "chat"


def _looks_like_summaries(conversations: Sequence[Conversation], answers: Sequence[str]) -> bool:
    single = all(sum(m.role == "user" for m in c.messages) == 1 for c in conversations)
    texts = [sum(len(m.content) for m in c.messages if m.role == "user") for c in conversations]
    lengths = [len(answer) for answer in answers]
    middle_text, middle_answer = sorted(texts)[len(texts) // 2], sorted(lengths)[len(lengths) // 2]
    return single and middle_text >= SUMMARY_CHARS and middle_text >= SUMMARY_RATIO * middle_answer >= 60


def is_json_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _checked(
    task: Task, path: str, samples: Sequence[Conversation | str], answers: Sequence[str], labels: Sequence[str]
) -> Task:
    """The named task. Raises ConfigError if the records do not fit it."""
    is_text = any(isinstance(sample, str) for sample in samples)
    if is_text != (task == "pretrain"):
        kind = "plain text" if is_text else "conversations"
        fitting = "pretrain" if is_text else "chat"
        raise ConfigError(f"--task {task}: {path} holds {kind}; use --task {fitting}")
    if task == "classify" and not labels:
        raise ConfigError(
            f"--task classify: the {len(set(answers))} different answers in {len(answers)} records of {path} are no classes; "
            f"use at most {MAX_LABELS} short answers that repeat, or --task chat"
        )
    if task == "extract" and not all(is_json_object(answer) for answer in answers):
        raise ConfigError(
            f"--task extract: some answers in {path} are not JSON objects; correct them, or use --task chat"
        )
    return task
