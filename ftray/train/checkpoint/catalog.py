"""The committed checkpoints, progress and metrics of a run, as storage has them. No Ray, no torch.

A checkpoint is `<run>/checkpoints/step-000200/`; without a manifest.json it does not exist. The newest committed checkpoint
defines where a run stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ftray import storage
from ftray.errors import CheckpointError, ConfigError
from ftray.train import segments

Segment = list[dict[str, Any]]  # the lines of metrics that one checkpoint committed


@dataclass
class RunProgress:
    """Where a run stands after `step` optimizer steps; part of each checkpoint.

    Attributes:
        step: Optimizer steps done.
        num_updates: Steps that changed the weights.
        num_bad_steps: Steps with a non-finite loss or gradient.
        bad_in_row: Such steps in a row, up to this one.
        finished: Whether the run is trained to its end.
        position: Cursor of each data source; it follows from step and data and is kept for comparison.
        best: Step and loss of the best eval.
        since_best: Evals since then.
        segments: Names of the metrics segments on the committed timeline.
        sums: Checksums of the segments by name.
        loss_scale: fp16's loss scale, and what its next change depends on.
        micro_batch_size: Packed sequences per forward pass.
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
    sums: dict[str, str] = field(default_factory=dict)
    loss_scale: dict[str, float] | None = None
    micro_batch_size: int | None = None

    def note_eval(self, loss: float) -> bool:
        """Counts an eval loss at this step; True if it is the best so far. A loss that is not finite never is."""
        is_best = math.isfinite(loss) and (self.best is None or loss < self.best["loss"])
        if is_best:
            self.best = {"step": self.step, "loss": loss}
        self.since_best = 0 if is_best else self.since_best + 1
        return is_best


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint: its URI and its manifest's meta."""

    uri: str
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.meta["progress"]["step"])

    @property
    def progress(self) -> RunProgress:
        """Progress of the run at this checkpoint."""
        return RunProgress(**self.meta["progress"])


@dataclass(frozen=True)
class Damaged:
    """A committed checkpoint that cannot be read. step: By its directory's name."""

    uri: str
    step: int
    reason: str


def scan_checkpoints(run_dir: str) -> tuple[list[CheckpointRef], list[Damaged]]:
    """Committed checkpoints with a valid manifest, and damaged ones; newest first.

    A directory without manifest and without mark was never committed: it is neither.
    """
    root = storage.join(run_dir, "checkpoints")
    names: dict[str, set[str]] = {}
    for file in storage.list_files(root):
        name, _, rest = file.path.partition("/")
        if rest in (storage.MANIFEST, storage.MARK):
            names.setdefault(name, set()).add(rest)
    checkpoints, damaged = [], []
    for name, files in names.items():
        uri = storage.join(root, name)
        try:
            if storage.MANIFEST not in files or (manifest := storage.read_manifest(uri)) is None:
                raise CheckpointError(
                    f"{storage.join(uri, storage.MANIFEST)} is missing, but the checkpoint was committed"
                )
            _check_progress(uri, manifest["meta"])
            checkpoints.append(CheckpointRef(uri, manifest["meta"]))
        except CheckpointError as err:
            if storage.exists(uri):  # else it was deleted meanwhile
                damaged.append(Damaged(uri, _step_of(name), str(err)))
    return (
        sorted(checkpoints, key=lambda f: f.step, reverse=True),
        sorted(damaged, key=lambda d: d.step, reverse=True),
    )


def _step_of(name: str) -> int:
    digits = name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdecimal() else 0


def _check_progress(uri: str, meta: dict[str, Any]) -> None:
    """Raises CheckpointError for a valid manifest that is not one of a checkpoint."""
    tree = meta.get("progress")
    known = {each.name for each in fields(RunProgress)}
    if not isinstance(tree, dict) or not isinstance(tree.get("step"), int) or not tree.keys() <= known:
        raise CheckpointError(f"{storage.join(uri, storage.MANIFEST)} is damaged: it has no training progress")
    names, best = tree.get("segments", []), tree.get("best")
    is_named = isinstance(names, list) and all(isinstance(n, str) and segments.NAME.fullmatch(n) for n in names)
    is_judged = best is None or (isinstance(best, dict) and {"step", "loss"} <= best.keys())
    if not is_named or not is_judged or not isinstance(tree.get("sums", {}), dict):
        raise CheckpointError(f"{storage.join(uri, storage.MANIFEST)} is damaged: its training progress is invalid")


def list_checkpoints(run_dir: str, warn: Callable[[str], None] | None = None) -> list[CheckpointRef]:
    """Committed checkpoints of a run, newest first; damaged ones are skipped with a warning."""
    checkpoints, damaged = scan_checkpoints(run_dir)
    if warn is not None:
        for each in damaged:
            warn(each.reason)
    return checkpoints


def has_begun(run_dir: str) -> bool:
    """Whether a run has committed a checkpoint, even if it is damaged by now."""
    return any(scan_checkpoints(run_dir))


def best_checkpoint(run_dir: str, step: int | None = None) -> CheckpointRef:
    """The checkpoint with the best eval loss, or the newest if there were no evals.

    Args:
        run_dir: The run's directory.
        step: Takes the checkpoint of this step instead.

    Raises:
        ConfigError: There is no checkpoint.
        CheckpointError: The checkpoint is damaged or missing. An older one is taken only if its step is named.
    """
    checkpoints, damaged = scan_checkpoints(run_dir)
    if step is not None:
        return _of_step(run_dir, step, checkpoints, damaged)
    if not checkpoints and not damaged:
        raise ConfigError(f"{run_dir} has no checkpoint; train first: ftray train <run file>")
    if not checkpoints:
        raise CheckpointError(f"no checkpoint of {run_dir} can be read ({_reasons(damaged)}); restore one of them")
    steps = ", ".join(str(f.step) for f in checkpoints)
    if damaged and damaged[0].step > checkpoints[0].step:
        raise CheckpointError(
            f"the newest checkpoint is damaged: {damaged[0].reason}. Restore it, continue from step {checkpoints[0].step} "
            f"(ftray train), or choose a checkpoint with --step ({steps})"
        )
    best = checkpoints[0].progress.best
    if best is None:
        return checkpoints[0]
    for each in checkpoints:
        if each.step == int(best["step"]):
            return each
    reason = next((d.reason for d in damaged if d.step == int(best["step"])), "it is missing")
    raise CheckpointError(
        f"the checkpoint of step {int(best['step'])}, which had the best eval loss, cannot be read: {reason}. Restore it, or "
        f"choose a checkpoint with --step ({steps})"
    )


def _of_step(run_dir: str, step: int, checkpoints: list[CheckpointRef], damaged: list[Damaged]) -> CheckpointRef:
    for each in checkpoints:
        if each.step == step:
            return each
    for other in damaged:
        if other.step == step:
            raise CheckpointError(
                f"--step {step}: that checkpoint is damaged: {other.reason}; restore it, or choose another"
            )
    steps = ", ".join(str(each.step) for each in checkpoints) or "none"
    raise ConfigError(f"--step {step}: {run_dir} has no checkpoint of that step; available: {steps}")


def _reasons(damaged: list[Damaged]) -> str:
    more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return f"{damaged[0].reason}{more}"


def find_newest(run_dir: str, warn: Callable[[str], None], below_updates: float = math.inf) -> CheckpointRef | None:
    """The newest checkpoint whose files all match its manifest.

    Args:
        run_dir: The run's directory.
        warn: Gets a message about each damaged checkpoint that is skipped.
        below_updates: Considers only checkpoints with fewer weight updates.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    num_damaged = 0
    sound, damaged = scan_checkpoints(run_dir)
    both: list[CheckpointRef | Damaged] = [*sound, *damaged]
    for each in sorted(both, key=lambda c: c.step, reverse=True):
        if isinstance(each, Damaged):
            reason = each.reason
        elif each.progress.num_updates >= below_updates:
            continue
        else:
            problems = storage.verify_directory(each.uri)
            if not problems:
                return each
            reason = problems[0]
        num_damaged += 1
        warn(f"checkpoint {each.uri} is damaged ({reason}); using the previous one")
    if num_damaged and below_updates == math.inf:
        directory = storage.join(run_dir, "checkpoints")
        raise CheckpointError(
            f"all {num_damaged} checkpoints in {directory} are damaged; restore one, or delete {directory} to start again"
        )
    return None


def merge_metrics(run_dir: str, progress: RunProgress, warn: Callable[[str], None] | None = None) -> int:
    """Writes `<run>/metrics.jsonl` from the segments of the committed timeline; returns its number of lines.

    warn: Gets a message about each damaged segment; its steps are left out if there is no copy.
    """
    lines = _metric_lines(run_dir, progress, warn)
    storage.write_bytes(
        storage.join(run_dir, "metrics.jsonl"), "".join(f"{lines[s]}\n" for s in sorted(lines)).encode()
    )
    return len(lines)


def read_metrics(
    run_dir: str, most: int | None = None, warn: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """The metrics of each committed step, in order, also of a run that is still training.

    Args:
        run_dir: The run's directory.
        most: Reads only the first segment and the newest ones, so many in total.
        warn: Gets a message about each damaged segment.
    """
    checkpoints = list_checkpoints(run_dir)
    if checkpoints:
        progress = checkpoints[0].progress
        if most is not None and len(progress.segments) > most:
            progress = replace(progress, segments=[progress.segments[0], *progress.segments[1 - most :]])
        lines = _metric_lines(run_dir, progress, warn)
        return [json.loads(lines[step]) for step in sorted(lines)]
    merged = segments.read_merged(run_dir)
    return [json.loads(merged[step]) for step in sorted(merged)]


def read_segments(run_dir: str, kept: dict[str, Segment], warn: Callable[[str], None] | None = None) -> list[Segment]:
    """The metrics of the committed timeline, by the checkpoint that committed them; no step twice, no segment empty.

    kept: Segments of earlier calls by name and etag; only new ones are read.
    """
    checkpoints = list_checkpoints(run_dir)
    progress = checkpoints[0].progress if checkpoints else RunProgress()
    etags = {file.path: file.etag for file in storage.list_files(storage.join(run_dir, "metrics"))}
    firsts = [int(name[:8]) for name in progress.segments]
    reader = segments.SegmentReader(run_dir, progress.sums, warn or _ignore)
    read = []
    for i, name in enumerate(progress.segments):
        end = firsts[i + 1] if i + 1 < len(firsts) else math.inf
        key = f"{name} {etags.get(name)}"
        if key not in kept:
            kept[key] = [json.loads(line) for line in reader.lines(name).values()]
        read.append([line for line in kept[key] if line["step"] < end])
    return [lines for lines in read if lines]


def _metric_lines(run_dir: str, progress: RunProgress, warn: Callable[[str], None] | None) -> dict[int, str]:
    """Lines by step. A segment that a later one overlaps (after a rewind) counts up to the start of the later one."""
    reader = segments.SegmentReader(run_dir, progress.sums, warn or _ignore)
    lines: dict[int, str] = {}
    for segment in progress.segments:
        first = int(segment[:8])
        lines = {step: line for step, line in lines.items() if step < first}
        lines |= reader.lines(segment)
    return lines


def _ignore(_: str) -> None:
    """For callers that have reported damage before."""
