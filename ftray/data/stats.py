"""Statistics of a data set before training: counts, lengths, labels, scripts, duplicates, and warnings.

Everything comes from the index and its record tables. Of the data, only the records that are shown are read again. `collect`
computes the statistics, `show_stats` prints them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray import config, storage
from ftray.console import Console
from ftray.data.checks.labels import count_labels
from ftray.data.chunks import DatasetSpec
from ftray.data.index import Index, read_record_table
from ftray.data.prepare import PreparedData, fill_warning, shortened_text
from ftray.data.preview import LEGEND, paint, uses_color
from ftray.data.record_table import CAPITAL, FINAL_MARK, JSON_LIKE, MANY_LINES, RecordTable
from ftray.data.shown_records import ShownRecord, pick_records

PERCENTILES = (1, 10, 50, 90, 99)
NUM_BINS = 24
MAX_LABELS = 200  # answers with more distinct values are not labels
FEW_RECORDS, FEW_EVAL, FEW_OF_A_LABEL = 500, 50, 10
UNBALANCED, LONG_TAIL, MIXED = 10.0, 8.0, (0.02, 0.25)
STYLES = {
    "begin with a capital": CAPITAL,
    "end with a full stop, ! or ?": FINAL_MARK,
    "have several lines": MANY_LINES,
    "look like JSON": JSON_LIKE,
}


@dataclass(frozen=True)
class SplitStats:
    """Statistics of the training data or of the eval set.

    Attributes:
        fill: Share of the sequences' tokens that are not padding.
        lengths: Tokens of each record, sorted.
        labels: Records per label, or None if the answers are not labels.
        scripts: Share of letters per Unicode script.
        styles: Share of answers per style.
        bad: Bad records by rule.
        found: Records with a finding, by rule.
        left: Records with a finding that are still in the sequences, by rule.
        shortened: What `data.too_long` did to records, in words.
    """

    name: str
    num_records: int
    num_tokens: int
    num_trained_tokens: int
    num_sequences: int
    fill: float
    lengths: npt.NDArray[np.int32]
    labels: dict[str, int] | None
    scripts: dict[str, float]
    styles: dict[str, float]
    bad: dict[str, int]
    found: dict[str, int]
    left: dict[str, int]
    shortened: str = ""

    def percentile(self, share: float) -> int:
        """The length in tokens that this percentage of the records does not exceed."""
        return int(np.percentile(self.lengths, share, method="higher")) if len(self.lengths) else 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, records) of at most NUM_BINS bins of equal width."""
        if not len(self.lengths):
            return []
        low, high = int(self.lengths[0]), int(self.lengths[-1]) + 1
        edges = np.unique(np.linspace(low, high, min(NUM_BINS, high - low) + 1).astype(int))
        counts, _ = np.histogram(self.lengths, edges)
        return [(int(a), int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


@dataclass(frozen=True)
class DatasetStats:
    """Statistics of both splits, warnings, and records of the training data to show."""

    train: SplitStats
    eval_set: SplitStats | None
    warnings: list[str]
    records: list[ShownRecord] = field(default_factory=list)


def collect(stream: DatasetSpec, index: Index, table: RecordTable, name: str, labels: list[str] | None) -> SplitStats:
    """Statistics of the records that are in the sequences of a training or eval set."""
    kept = _kept(index, table)
    flags = table.column("flags")[kept]
    answers = table.texts("label").filter(pa.array(kept))
    scripts = sum((Counter(s.scripts) for s in table.summaries), Counter[str]())
    letters = max(1, scripts.total())
    sequences, tokens = index.total("num_sequences"), index.total("num_tokens")
    return SplitStats(
        name,
        index.total("num_records"),
        tokens,
        index.total("num_trained_tokens"),
        sequences,
        tokens / max(1, sequences * stream.max_seq_len),
        np.sort(table.column("num_tokens")[kept]),
        _labels(answers, labels),
        {script: number / letters for script, number in scripts.most_common()},
        {style: float((flags & bit > 0).mean()) if len(flags) else 0.0 for style, bit in STYLES.items()},
        _count(index.bad),
        {rule: number for rule, (number, _) in index.found.items()},
        {rule: left for rule, (_, left) in index.found.items() if left},
        shortened_text(index.shortened, stream.data.too_long) if index.shortened and stream.data else "",
    )


def _kept(index: Index, table: RecordTable) -> npt.NDArray[np.bool_]:
    """bool [records]: those that `data.clean` does not remove."""
    return np.concatenate(
        [
            np.isin(records.batch.column("position").to_numpy(), facts.chunk.dropped, invert=True)
            for records, facts in zip(table.described, index.facts, strict=True)
        ]
        or [np.zeros(0, bool)]
    )


def _labels(answers: pa.ChunkedArray, allowed: list[str] | None) -> dict[str, int] | None:
    """Counts of the allowed labels, or of the answers if these are short and often the same."""
    counted = answers.value_counts()  # of a few labels, or of many distinct answers
    if allowed is None and (answers.null_count or not 1 < len(counted) <= min(MAX_LABELS, len(answers) // 3)):
        return None
    return count_labels({pair["values"]: pair["counts"] for pair in counted.to_pylist()}, allowed)


def _count(entries: Sequence[Any]) -> dict[str, int]:
    return dict(Counter(entry.rule for entry in entries).most_common())


def warn(train: SplitStats, eval_set: SplitStats | None, global_batch_size: int, data: config.DataConfig) -> list[str]:
    """Departures from common advice, each with a remedy.

    Args:
        train: The training data.
        eval_set: The eval set, if there is one.
        global_batch_size: In sequences.
        data: The section of the run file.
    """
    poor = fill_warning(train.fill, train.num_sequences, data)
    warnings = [] if poor is None else [poor]
    if train.num_records < FEW_RECORDS:
        warnings.append(
            f"only {train.num_records} training records. Below {FEW_RECORDS}, use LoRA with a low rank, and watch the "
            "eval loss for overfitting"
        )
    if train.num_sequences < global_batch_size:
        warnings.append(
            f"an epoch has {train.num_sequences} sequences, fewer than a global batch ({global_batch_size}); "
            "lower train.global_batch_size"
        )
    if train.labels and min(train.labels.values()) * UNBALANCED < max(train.labels.values()):
        (most, many), (least, few) = next(iter(train.labels.items())), list(train.labels.items())[-1]
        warnings.append(
            f"classes are unbalanced: {many} records of {most!r}, but {few} of {least!r}; add records of rare classes"
        )
    rare = [label for label, number in (train.labels or {}).items() if number < FEW_OF_A_LABEL]
    if rare:
        shown = ", ".join(map(repr, rare[:5])) + (", …" if len(rare) > 5 else "")
        warnings.append(
            f"{len(rare)} labels have fewer than {FEW_OF_A_LABEL} records ({shown}); add some, or merge labels"
        )
    for style, share in train.styles.items():
        if train.labels is None and MIXED[0] <= min(share, 1 - share) <= MIXED[1]:
            warnings.append(
                f"the style of answers is inconsistent: {share:.0%} {style}, the others do not; choose one style"
            )
    if train.percentile(50) and train.percentile(99) > LONG_TAIL * train.percentile(50):
        warnings.append(
            f"the lengths have a long tail: the median is {train.percentile(50)} tokens, the 99th percentile "
            f"{train.percentile(99)}; check the longest records"
        )
    for rule, remedy in (
        ("conflict", "correct one of each"),
        ("contamination", "set data.clean.contamination to drop"),
    ):
        if number := train.left.get(rule, 0):
            warnings.append(f"{number} records {_DESCRIPTIONS[rule]}; {remedy}")
    copies = train.left.get("duplicate", 0) + train.left.get("near_duplicate", 0)
    if copies > 0.01 * train.num_records:
        warnings.append(
            f"{copies} records ({copies / train.num_records:.1%}) are duplicates or near-duplicates; set "
            "data.clean.duplicates and data.clean.near_duplicates to drop"
        )
    if eval_set is None:
        warnings.append("there is no eval set to detect overfitting; set data.eval: {fraction: 0.1}")
    elif eval_set.num_records < FEW_EVAL:
        warnings.append(f"only {eval_set.num_records} eval records: their loss will be noisy; use {FEW_EVAL} or more")
    return warnings


_DESCRIPTIONS = {
    "duplicate": "repeat an earlier record",
    "near_duplicate": "nearly repeat an earlier record",
    "contamination": "overlap with the eval set",
    "conflict": "have the same input as another record, but another answer",
    "short_answer": "have a very short answer",
    "repeated_lines": "have mostly repeated lines",
    "unprintable": "have many unprintable characters",
}


def show_stats(data: PreparedData, run: config.RunConfig, run_dir: str, console: Console) -> DatasetStats:
    """Prints the statistics of a run's data and returns them."""
    directory = storage.join(run_dir, "data")
    splits = [("train", data.plan.stream, data.index), ("eval", data.eval_stream, data.eval_index)]
    parts = [
        collect(stream, index, read_record_table(index, directory), name, run.data.labels)
        for name, stream, index in splits
        if stream is not None and index is not None
    ]
    eval_set = parts[1] if len(parts) > 1 else None
    table = read_record_table(data.index, directory)
    labels = list(parts[0].labels or {})
    records = pick_records(data.index, table, _kept(data.index, table), data.plan.stream, labels)
    stats = DatasetStats(parts[0], eval_set, warn(parts[0], eval_set, run.train.global_batch_size, run.data), records)
    for line in as_text(stats):
        console.say(line)
    _show_records(records, console)
    if data.index.findings is not None:
        console.say(f"\nAll findings: {storage.join(directory, data.index.findings)}")
    return stats


def _show_records(records: Sequence[ShownRecord], console: Console) -> None:
    color = uses_color(console)
    console.say(f"\nrecords: {LEGEND[color]}", styled=True)
    for record in records:
        console.say(f"\n--- {record.title}: {record.note}")
        for spans in record.documents:
            console.say(paint(spans, color), styled=True)


def as_text(stats: DatasetStats) -> list[str]:
    """The statistics as lines of text."""
    lines = []
    for part in (stats.train, stats.eval_set):
        if part is not None:
            lines += ["", f"data.{part.name}", *[f"  {name:<13}{text}" for name, text in facts(part)]]
            lines += [f"  {'':<13}{low:>6}–{high - 1:<6}{number:>9} {bar}" for low, high, number, bar in _bars(part)]
    if stats.warnings:
        lines += ["", "warnings", *[f"  - {warning}" for warning in stats.warnings]]
    return lines


def facts(part: SplitStats) -> list[tuple[str, str]]:
    """(name, text) of everything except the plots."""
    trained = part.num_trained_tokens / max(1, part.num_tokens)
    pairs = [
        ("records", f"{part.num_records:,}"),
        ("tokens", f"{part.num_tokens:,}; trained on: {part.num_trained_tokens:,} ({trained:.1%})"),
        ("sequences", f"{part.num_sequences:,}, {part.fill:.1%} full"),
        (
            "lengths",
            ", ".join(f"{p}%: {part.percentile(p)}" for p in PERCENTILES) + f", longest: {part.percentile(100)}",
        ),
        (
            "scripts",
            ", ".join(f"{s.title()} {share:.1%}" for s, share in list(part.scripts.items())[:6]) or "no letters",
        ),
    ]
    if part.labels is not None:
        shown = ", ".join(f"{label} {number}" for label, number in list(part.labels.items())[:12])
        pairs.append(("labels", f"{len(part.labels)}: {shown}{', …' if len(part.labels) > 12 else ''}"))
    if part.shortened:
        pairs.append(("too long", part.shortened))
    pairs += [("found", f"{n} {_DESCRIPTIONS[rule]}{_removed(part, rule)}") for rule, n in part.found.items()]
    pairs += [("quarantined", f"{number} {rule}") for rule, number in part.bad.items()]
    return pairs


def _removed(part: SplitStats, rule: str) -> str:
    removed = part.found[rule] - part.left.get(rule, 0)
    return f" ({removed} removed)" if removed else ""


def _bars(part: SplitStats) -> list[tuple[int, int, int, str]]:
    bins = part.histogram()
    most = max((number for _, _, number in bins), default=1)
    return [(low, high, number, "█" * round(40 * number / most)) for low, high, number in bins]
