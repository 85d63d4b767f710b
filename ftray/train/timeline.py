"""What storage says of a run: committed checkpoints, how far it is, its metrics. No Ray, no torch.

A checkpoint is `<run>/checkpoints/step-000200/`; without a manifest.json it doesn't exist. The newest committed one is
the truth, not what a controller remembers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ftray import storage
from ftray.errors import CheckpointError, ConfigError

Segment = list[dict[str, Any]]  # the lines of metrics that one checkpoint committed


@dataclass
class Progress:
    """Where a run stands after `step` optimizer steps; goes into each checkpoint.

    position: cursor of each data source (it follows from step and data; kept to be compared). num_updates: steps that
    changed the weights. bad_in_row: non-finite steps just before this one. best: step and held-out loss. since_best:
    held-out losses since then. segments: first steps of the metrics segments on the committed timeline. loss_scale:
    fp16's scale and what its next change depends on. micro_batch_size: rows that a worker computed at once.
    """

    step: int = 0
    num_updates: int = 0
    num_bad_steps: int = 0
    bad_in_row: int = 0
    finished: bool = False
    position: list[dict[str, int]] = field(default_factory=list)
    best: dict[str, float] | None = None
    since_best: int = 0
    segments: list[str] = field(default_factory=list)
    loss_scale: dict[str, float] | None = None
    micro_batch_size: int | None = None

    def note_heldout(self, loss: float) -> bool:
        """Counts a held-out loss at this step; True when it is the best so far. One that is not finite never is."""
        is_best = math.isfinite(loss) and (self.best is None or loss < self.best["loss"])
        if is_best:
            self.best = {"step": self.step, "loss": loss}
        self.since_best = 0 if is_best else self.since_best + 1
        return is_best


@dataclass(frozen=True)
class Found:
    """A committed checkpoint: its URI and the manifest's meta."""

    uri: str
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.meta["progress"]["step"])

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return Progress(**self.meta["progress"])


def list_checkpoints(run_dir: str, warn: Callable[[str], None] | None = None) -> list[Found]:
    """Committed checkpoints of a run, newest first; those whose manifest is damaged are passed over, with a warning."""
    found = []
    for file in storage.list_files(storage.join(run_dir, "checkpoints"), suffix="/manifest.json"):
        uri = file.uri.rsplit("/", 1)[0]
        try:
            if (manifest := storage.read_manifest(uri)) is not None:
                found.append(Found(uri, manifest["meta"]))
        except CheckpointError as err:
            if warn is not None:
                warn(str(err))
    return sorted(found, key=lambda f: f.step, reverse=True)


def best_checkpoint(run_dir: str) -> Found:
    """The checkpoint with the best held-out loss, where losses were taken during training, else the newest.

    Raises ConfigError when there is none.
    """
    found = list_checkpoints(run_dir)
    if not found:
        raise ConfigError(f"{run_dir} has no checkpoint; train first: ftray train <run file>")
    best = found[0].progress.best
    return next((f for f in found if best and f.step == int(best["step"])), found[0])


def find_newest(run_dir: str, warn: Callable[[str], None], below_updates: float = math.inf) -> Found | None:
    """The newest checkpoint whose files all match its manifest; says which damaged ones it passes over.

    below_updates: only of those that had fewer updates of the weights. Raises CheckpointError where there are
    checkpoints, and all are damaged.
    """
    damaged: list[str] = []

    def note(text: str) -> None:
        damaged.append(text)
        warn(text)

    for found in list_checkpoints(run_dir, note):
        if found.progress.num_updates >= below_updates:
            continue
        problems = storage.verify_directory(found.uri)
        if not problems:
            return found
        note(f"checkpoint {found.uri} is damaged ({problems[0]}); the one before it is used")
    if damaged and below_updates == math.inf:
        place = storage.join(run_dir, "checkpoints")
        raise CheckpointError(
            f"all checkpoints in {place} are damaged ({len(damaged)}); restore one, or delete {place} to begin anew"
        )
    return None


def merge_metrics(run_dir: str, progress: Progress) -> int:
    """Writes `<run>/metrics.jsonl` out of the committed timeline's segments; returns its number of lines."""
    lines = _metric_lines(run_dir, progress)
    storage.write_bytes(
        storage.join(run_dir, "metrics.jsonl"), "".join(f"{lines[s]}\n" for s in sorted(lines)).encode()
    )
    return len(lines)


def read_metrics(run_dir: str, most: int | None = None) -> list[dict[str, Any]]:
    """A line for each committed step, in order, also of a run that still trains.

    most: segments that are read, the first and the newest of them; left out: all.
    """
    found = list_checkpoints(run_dir)
    if found:
        progress = found[0].progress
        if most is not None and len(progress.segments) > most:
            progress = replace(progress, segments=[progress.segments[0], *progress.segments[1 - most :]])
        lines = _metric_lines(run_dir, progress)
        return [json.loads(lines[step]) for step in sorted(lines)]
    uri = storage.join(run_dir, "metrics.jsonl")
    return [json.loads(line) for line in storage.read_bytes(uri).splitlines()] if storage.exists(uri) else []


def read_segments(run_dir: str, kept: dict[str, Segment]) -> list[Segment]:
    """The lines of the committed timeline by the checkpoint that committed them; none twice, none is empty.

    kept: what earlier calls have read, by name and etag; only what is new is read again.
    """
    found = list_checkpoints(run_dir)
    names = found[0].progress.segments if found else []
    etags = {file.path: file.etag for file in storage.list_files(storage.join(run_dir, "metrics"))}
    firsts = [int(name[:8]) for name in names]
    segments = []
    for i, name in enumerate(names):
        end = firsts[i + 1] if i + 1 < len(firsts) else math.inf
        key = f"{name} {etags.get(name)}"
        if key not in kept:
            text = storage.read_bytes(storage.join(run_dir, "metrics", name)).decode()
            kept[key] = [json.loads(line) for line in text.splitlines()]
        segments.append([line for line in kept[key] if line["step"] < end])
    return [lines for lines in segments if lines]


def _metric_lines(run_dir: str, progress: Progress) -> dict[int, str]:
    """Lines by step. A segment that a later one overlaps (after a fall-back) counts up to where that one begins."""
    lines: dict[int, str] = {}
    for segment in progress.segments:
        first = int(segment[:8])
        lines = {step: line for step, line in lines.items() if step < first}
        text = storage.read_bytes(storage.join(run_dir, "metrics", segment)).decode()
        lines |= {int(json.loads(line)["step"]): line for line in text.splitlines()}
    return lines
