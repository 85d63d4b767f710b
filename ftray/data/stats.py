"""What a data set is like, before anything is trained on it: counts, lengths, labels, scripts, copies, and warnings.

Everything comes from the index and its record tables; nothing is read a second time. `collect` works it out, `show_stats`
prints it and writes it as a page (`page`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray import config, storage
from ftray.console import Console
from ftray.data.checks.labels import count_labels
from ftray.data.chunks import DatasetSpec
from ftray.data.index import Index, read_record_table
from ftray.data.prepare import PreparedData
from ftray.data.record_table import CAPITAL, FINAL_MARK, JSON_LIKE, MANY_LINES, RecordTable

PERCENTILES = (1, 10, 50, 90, 99)
NUM_BINS = 24
MAX_LABELS = 200  # more different short answers are no labels
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
    """Figures of the training or of the held-out data. lengths: tokens of each record, sorted. labels: None where the
    answers are no labels. styles: share of answers written in each way. bad, found: records by rule; left: of the found ones
    those that are still in the sequences."""

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

    def percentile(self, share: float) -> int:
        """Length in tokens that this share (in percent) of the records doesn't exceed."""
        return int(np.percentile(self.lengths, share, method="higher")) if len(self.lengths) else 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, records) of NUM_BINS or fewer bins of equal width."""
        if not len(self.lengths):
            return []
        low, high = int(self.lengths[0]), int(self.lengths[-1]) + 1
        edges = np.unique(np.linspace(low, high, min(NUM_BINS, high - low) + 1).astype(int))
        counts, _ = np.histogram(self.lengths, edges)
        return [(int(a), int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


@dataclass(frozen=True)
class DatasetStats:
    """Both parts, and what a person should look at."""

    train: SplitStats
    eval_set: SplitStats | None
    warnings: list[str]


def collect(stream: DatasetSpec, index: Index, survey: RecordTable, name: str, labels: list[str] | None) -> SplitStats:
    """Figures of a stream, of the records that are in its sequences."""
    kept = np.concatenate(
        [
            np.isin(found.batch.column("position").to_numpy(), facts.chunk.dropped, invert=True)
            for found, facts in zip(survey.described, index.facts, strict=True)
        ]
        or [np.zeros(0, bool)]
    )
    flags = survey.column("flags")[kept]
    answers = survey.texts("label").filter(pa.array(kept))
    scripts = sum((Counter(s.scripts) for s in survey.summaries), Counter[str]())
    letters = max(1, scripts.total())
    sequences, tokens = index.total("num_sequences"), index.total("num_tokens")
    return SplitStats(
        name,
        index.total("num_records"),
        tokens,
        index.total("num_trained_tokens"),
        sequences,
        tokens / max(1, sequences * stream.max_seq_len),
        np.sort(survey.column("num_tokens")[kept]),
        _labels(answers, labels),
        {script: number / letters for script, number in scripts.most_common()},
        {style: float((flags & bit > 0).mean()) if len(flags) else 0.0 for style, bit in STYLES.items()},
        _count(index.bad),
        {rule: number for rule, (number, _) in index.found.items()},
        {rule: left for rule, (_, left) in index.found.items() if left},
    )


def _labels(answers: pa.ChunkedArray, allowed: list[str] | None) -> dict[str, int] | None:
    """Counts of labels: of the allowed ones, or of the answers where these are short and often the same."""
    counted = answers.value_counts()  # of the few different ones, or of so many that they are no labels
    if allowed is None and (answers.null_count or not 1 < len(counted) <= min(MAX_LABELS, len(answers) // 3)):
        return None
    return count_labels({pair["values"]: pair["counts"] for pair in counted.to_pylist()}, allowed)


def _count(entries: Sequence[Any]) -> dict[str, int]:
    return dict(Counter(entry.rule for entry in entries).most_common())


def warn(train: SplitStats, eval_set: SplitStats | None, global_batch_size: int) -> list[str]:
    """What the field's guides advise against, each with what to do. global_batch_size: sequences of a global batch."""
    said = []
    if train.num_records < FEW_RECORDS:
        said.append(
            f"only {train.num_records} training records: below {FEW_RECORDS}, quality and variety decide; use LoRA with a "
            "low rank, and look at held-out loss for overfitting"
        )
    if train.num_sequences < global_batch_size:
        said.append(
            f"an epoch has {train.num_sequences} sequences and a global batch {global_batch_size}: lower train.global_batch_size"
        )
    if train.labels and min(train.labels.values()) * UNBALANCED < max(train.labels.values()):
        (most, many), (least, few) = next(iter(train.labels.items())), list(train.labels.items())[-1]
        said.append(f"classes are unbalanced: {many} of {most!r}, {few} of {least!r}; add records of the rare ones")
    rare = [label for label, number in (train.labels or {}).items() if number < FEW_OF_A_LABEL]
    if rare:
        shown = ", ".join(map(repr, rare[:5])) + (", …" if len(rare) > 5 else "")
        said.append(f"{len(rare)} labels have fewer than {FEW_OF_A_LABEL} records ({shown}); add some, or merge labels")
    for style, share in train.styles.items():
        if train.labels is None and MIXED[0] <= min(share, 1 - share) <= MIXED[1]:
            said.append(f"answers are written inconsistently: {share:.0%} {style}, the others don't; choose one way")
    if train.percentile(50) and train.percentile(99) > LONG_TAIL * train.percentile(50):
        said.append(
            f"a very long tail: half of the records have at most {train.percentile(50)} tokens, one in a hundred more than "
            f"{train.percentile(99)}; look at the longest"
        )
    for rule, remedy in (("conflict", "correct one of each"), ("overlap", "set data.clean.contamination to drop")):
        if number := train.left.get(rule, 0):
            said.append(f"{number} records {_WORDS[rule]}; {remedy}")
    copies = train.left.get("duplicate", 0) + train.left.get("near_duplicate", 0)
    if copies > 0.01 * train.num_records:
        said.append(f"{copies} records ({copies / train.num_records:.1%}) repeat others; set data.clean to drop them")
    if eval_set is None:
        said.append("nothing is held out, so that overfitting won't be seen; set data.eval: {fraction: 0.1}")
    elif eval_set.num_records < FEW_EVAL:
        said.append(
            f"only {eval_set.num_records} held-out records: their loss will be noisy; hold out {FEW_EVAL} or more"
        )
    return said


_WORDS = {
    "duplicate": "say the same as an earlier one",
    "near_duplicate": "say nearly the same as an earlier one",
    "overlap": "give a held-out record away",
    "conflict": "have the same input as another and another answer",
    "short_answer": "have a very short answer",
    "repeated_lines": "have mostly repeated lines",
    "unprintable": "have many characters that can't be printed",
}


def show_stats(data: PreparedData, run: config.RunConfig, run_dir: str, console: Console) -> DatasetStats:
    """Prints the statistics of a run's data and returns them."""
    directory = storage.join(run_dir, "data")
    pairs = [("train", data.plan.stream, data.index), ("eval", data.eval_stream, data.eval_index)]
    parts = [
        collect(stream, index, read_record_table(index, directory), name, run.data.labels)
        for name, stream, index in pairs
        if stream is not None and index is not None
    ]
    eval_set = parts[1] if len(parts) > 1 else None
    stats = DatasetStats(parts[0], eval_set, warn(parts[0], eval_set, run.train.global_batch_size))
    for line in as_text(stats):
        console.say(line)
    if data.index.findings is not None:
        console.say(f"\nwhat was found, record by record: {storage.join(directory, data.index.findings)}")
    return stats


def as_text(stats: DatasetStats) -> list[str]:
    """The figures as lines."""
    lines = []
    for part in (stats.train, stats.eval_set):
        if part is not None:
            lines += ["", f"data.{part.name}", *[f"  {name:<13}{text}" for name, text in facts(part)]]
            lines += [f"  {'':<13}{low:>6}–{high - 1:<6}{number:>9} {bar}" for low, high, number, bar in _bars(part)]
    if stats.warnings:
        lines += ["", "worth a look", *[f"  - {warning}" for warning in stats.warnings]]
    return lines


def facts(part: SplitStats) -> list[tuple[str, str]]:
    """(name, text) of everything but the plots."""
    supervised = part.num_trained_tokens / max(1, part.num_tokens)
    told = [
        ("records", f"{part.num_records:,}"),
        ("tokens", f"{part.num_tokens:,}, of which {part.num_trained_tokens:,} ({supervised:.1%}) are learned"),
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
        told.append(("labels", f"{len(part.labels)}: {shown}{', …' if len(part.labels) > 12 else ''}"))
    told += [("found", f"{n} {_WORDS[rule]}{_of_these(part, rule)}") for rule, n in part.found.items()]
    told += [("quarantined", f"{number} {rule}") for rule, number in part.bad.items()]
    return told


def _of_these(part: SplitStats, rule: str) -> str:
    gone = part.found[rule] - part.left.get(rule, 0)
    return f" ({gone} taken out)" if gone else ""


def _bars(part: SplitStats) -> list[tuple[int, int, int, str]]:
    bins = part.histogram()
    most = max((number for _, _, number in bins), default=1)
    return [(low, high, number, "█" * round(40 * number / most)) for low, high, number in bins]
