"""What storage says of a run: committed checkpoints, how far it is, its metrics. No Ray, no torch.

A checkpoint is `<run>/checkpoints/step-000200/`; without a manifest.json it doesn't exist. The newest committed one is
the truth, not what a controller remembers.
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
    """Where a run stands after `step` optimizer steps; goes into each checkpoint.

    position: cursor of each data source (it follows from step and data; kept to be compared). num_updates: steps that
    changed the weights. bad_in_row: non-finite steps just before this one. best: step and held-out loss. since_best:
    held-out losses since then. segments: names of the metrics segments on the committed timeline; sums: their sums, by
    name, of those written since there are sums. loss_scale: fp16's scale and what its next change depends on.
    micro_batch_size: rows that a worker computed at once.
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
        """Counts a held-out loss at this step; True when it is the best so far. One that is not finite never is."""
        is_best = math.isfinite(loss) and (self.best is None or loss < self.best["loss"])
        if is_best:
            self.best = {"step": self.step, "loss": loss}
        self.since_best = 0 if is_best else self.since_best + 1
        return is_best


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint: its URI and the manifest's meta."""

    uri: str
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.meta["progress"]["step"])

    @property
    def progress(self) -> RunProgress:
        """Where the run stood."""
        return RunProgress(**self.meta["progress"])


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that was committed and can't be read. step: by its directory's name; reason: a sentence."""

    uri: str
    step: int
    reason: str


def scan_checkpoints(run_dir: str) -> tuple[list[CheckpointRef], list[Damaged]]:
    """The committed checkpoints of a run that have a sound manifest, and those that don't; newest first.

    A directory without manifest and without mark was never committed: it is neither.
    """
    root = storage.join(run_dir, "checkpoints")
    names: dict[str, set[str]] = {}
    for file in storage.list_files(root):
        name, _, rest = file.path.partition("/")
        if rest in (storage.MANIFEST, storage.MARK):
            names.setdefault(name, set()).add(rest)
    found, damaged = [], []
    for name, inside in names.items():
        uri = storage.join(root, name)
        try:
            if storage.MANIFEST not in inside or (manifest := storage.read_manifest(uri)) is None:
                raise CheckpointError(
                    f"{storage.join(uri, storage.MANIFEST)} is missing, but the checkpoint was committed"
                )
            _check_progress(uri, manifest["meta"])
            found.append(CheckpointRef(uri, manifest["meta"]))
        except CheckpointError as err:
            if storage.exists(uri):  # else it was swept meanwhile
                damaged.append(Damaged(uri, _step_of(name), str(err)))
    return (
        sorted(found, key=lambda f: f.step, reverse=True),
        sorted(damaged, key=lambda d: d.step, reverse=True),
    )


def _step_of(name: str) -> int:
    digits = name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdecimal() else 0


def _check_progress(uri: str, meta: dict[str, Any]) -> None:
    """Raises CheckpointError for a manifest that is whole, but no checkpoint's."""
    tree = meta.get("progress")
    known = {each.name for each in fields(RunProgress)}
    if not isinstance(tree, dict) or not isinstance(tree.get("step"), int) or not tree.keys() <= known:
        raise CheckpointError(
            f"{storage.join(uri, storage.MANIFEST)} is damaged: it says nothing of training's progress"
        )
    names, best = tree.get("segments", []), tree.get("best")
    is_named = isinstance(names, list) and all(isinstance(n, str) and segments.NAME.fullmatch(n) for n in names)
    is_judged = best is None or (isinstance(best, dict) and {"step", "loss"} <= best.keys())
    if not is_named or not is_judged or not isinstance(tree.get("sums", {}), dict):
        raise CheckpointError(f"{storage.join(uri, storage.MANIFEST)} is damaged: its progress is not training's")


def list_checkpoints(run_dir: str, warn: Callable[[str], None] | None = None) -> list[CheckpointRef]:
    """Committed checkpoints of a run, newest first; those that are damaged are passed over, with a warning."""
    found, damaged = scan_checkpoints(run_dir)
    if warn is not None:
        for each in damaged:
            warn(each.reason)
    return found


def has_begun(run_dir: str) -> bool:
    """Whether a run has committed a checkpoint, be it damaged by now."""
    return any(scan_checkpoints(run_dir))


def best_checkpoint(run_dir: str, step: int | None = None) -> CheckpointRef:
    """The checkpoint with the best held-out loss, where losses were taken during training, else the newest.

    step: the one of this step instead. Raises ConfigError when there is none, CheckpointError where the one that is due
    is damaged or missing: an older one is taken only when its step is named.
    """
    found, damaged = scan_checkpoints(run_dir)
    if step is not None:
        return _of_step(run_dir, step, found, damaged)
    if not found and not damaged:
        raise ConfigError(f"{run_dir} has no checkpoint; train first: ftray train <run file>")
    if not found:
        raise CheckpointError(f"no checkpoint of {run_dir} can be read ({_reasons(damaged)}); restore one of them")
    steps = ", ".join(str(f.step) for f in found)
    if damaged and damaged[0].step > found[0].step:
        raise CheckpointError(
            f"the newest checkpoint is damaged: {damaged[0].reason}. Restore it, train on from step {found[0].step} "
            f"(ftray train), or name the checkpoint to take: --step N, of {steps}"
        )
    best = found[0].progress.best
    if best is None:
        return found[0]
    for each in found:
        if each.step == int(best["step"]):
            return each
    reason = next((d.reason for d in damaged if d.step == int(best["step"])), "it is missing")
    raise CheckpointError(
        f"the checkpoint of step {int(best['step'])}, which had the best held-out loss, can't be read: {reason}. Restore "
        f"it, or name the checkpoint to take: --step N, of {steps}"
    )


def _of_step(run_dir: str, step: int, found: list[CheckpointRef], damaged: list[Damaged]) -> CheckpointRef:
    for each in found:
        if each.step == step:
            return each
    for other in damaged:
        if other.step == step:
            raise CheckpointError(
                f"--step {step}: that checkpoint is damaged: {other.reason}; restore it, or name another"
            )
    there = f"there are {', '.join(str(f.step) for f in found)}" if found else "there is none"
    raise ConfigError(f"--step {step}: {run_dir} has no checkpoint of that step; {there}")


def _reasons(damaged: list[Damaged]) -> str:
    more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return f"{damaged[0].reason}{more}"


def find_newest(run_dir: str, warn: Callable[[str], None], below_updates: float = math.inf) -> CheckpointRef | None:
    """The newest checkpoint whose files all match its manifest; says which damaged ones it passes over.

    below_updates: only of those that had fewer updates of the weights. Raises CheckpointError where there are
    checkpoints, and all are damaged.
    """
    passed_over = 0
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
        passed_over += 1
        warn(f"checkpoint {each.uri} is damaged ({reason}); the one before it is used")
    if passed_over and below_updates == math.inf:
        place = storage.join(run_dir, "checkpoints")
        raise CheckpointError(
            f"all checkpoints in {place} are damaged ({passed_over}); restore one, or delete {place} to begin anew"
        )
    return None


def merge_metrics(run_dir: str, progress: RunProgress, warn: Callable[[str], None] | None = None) -> int:
    """Writes `<run>/metrics.jsonl` out of the committed timeline's segments; returns its number of lines.

    warn: told which segments are damaged; their steps are left out where no copy is found.
    """
    lines = _metric_lines(run_dir, progress, warn)
    storage.write_bytes(
        storage.join(run_dir, "metrics.jsonl"), "".join(f"{lines[s]}\n" for s in sorted(lines)).encode()
    )
    return len(lines)


def read_metrics(
    run_dir: str, most: int | None = None, warn: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """A line for each committed step, in order, also of a run that still trains.

    most: segments that are read, the first and the newest of them; left out: all. warn: told what is damaged.
    """
    found = list_checkpoints(run_dir)
    if found:
        progress = found[0].progress
        if most is not None and len(progress.segments) > most:
            progress = replace(progress, segments=[progress.segments[0], *progress.segments[1 - most :]])
        lines = _metric_lines(run_dir, progress, warn)
        return [json.loads(lines[step]) for step in sorted(lines)]
    merged = segments.read_merged(run_dir)
    return [json.loads(merged[step]) for step in sorted(merged)]


def read_segments(run_dir: str, kept: dict[str, Segment], warn: Callable[[str], None] | None = None) -> list[Segment]:
    """The lines of the committed timeline by the checkpoint that committed them; none twice, none is empty.

    kept: what earlier calls have read, by name and etag; only what is new is read again.
    """
    found = list_checkpoints(run_dir)
    progress = found[0].progress if found else RunProgress()
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
    """Lines by step. A segment that a later one overlaps (after a fall-back) counts up to where that one begins."""
    reader = segments.SegmentReader(run_dir, progress.sums, warn or _ignore)
    lines: dict[int, str] = {}
    for segment in progress.segments:
        first = int(segment[:8])
        lines = {step: line for step, line in lines.items() if step < first}
        lines |= reader.lines(segment)
    return lines


def _ignore(_: str) -> None:
    """For callers whose user was told of damage already."""
