"""Sweeps what runs left behind: checkpoints that were never committed, metrics off the committed timeline. No Ray, no torch.

A run with a live owner is left alone: the sweep takes the run's lease while it works.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ftray import storage
from ftray.console import Console
from ftray.errors import CheckpointError, ConfigError, RunHeldError
from ftray.train.timeline import list_checkpoints


@dataclass(frozen=True)
class Orphan:
    """What no run needs: its URI (a directory's, or a file's), what it is, size and age of its newest file."""

    uri: str
    what: str
    size_bytes: int
    age_s: float


def sweep_place(place: str, older_than_s: float, dry_run: bool, console: Console) -> int:
    """Sweeps a run, or all runs below a directory; returns the bytes that went, or would go.

    Raises ConfigError where there is no run, StorageError.
    """
    root = storage.absolute(place)
    runs = [root] if storage.exists(storage.join(root, "run.json")) else _runs_below(root)
    if not runs:
        raise ConfigError(f"{place} is neither a run's directory nor one that holds runs; correct the path")
    total = 0
    for run_dir in runs:
        try:
            with storage.acquire_lease(run_dir):
                found = [orphan for orphan in find_orphans(run_dir) if orphan.age_s >= older_than_s]
                for orphan in found:
                    console.say(
                        f"{'would go' if dry_run else 'gone'}: {orphan.uri} ({orphan.what}, {_size(orphan.size_bytes)})"
                    )
                    total += orphan.size_bytes
                    if not dry_run:
                        (storage.delete if orphan.what == SEGMENT else storage.delete_tree)(orphan.uri)
        except RunHeldError as err:
            console.say(f"left alone: {err}")
    console.say(f"{len(runs)} runs, {_size(total)} {'could be freed' if dry_run else 'freed'}")
    return total


SEGMENT = "metrics off the committed timeline"


def find_orphans(run_dir: str) -> list[Orphan]:
    """Checkpoint directories without a manifest, and metric segments that no committed checkpoint counts.

    A checkpoint whose manifest is damaged is no orphan: somebody may want to look at it.
    """
    files = defaultdict(list)
    for file in storage.list_files(storage.join(run_dir, "checkpoints")):
        files[file.path.split("/")[0]].append(file)
    orphans = []
    for name, inside in sorted(files.items()):
        if not any(file.path == f"{name}/{storage.MANIFEST}" for file in inside):
            age_s = min(storage.age_s(file.uri) for file in inside)
            size_bytes = sum(file.size_bytes for file in inside)
            orphans.append(Orphan(storage.join(run_dir, "checkpoints", name), "never committed", size_bytes, age_s))
    try:
        committed = list_checkpoints(run_dir, warn=_refuse)
    except CheckpointError:
        return orphans  # which segments a damaged manifest counted is not known
    counted = {segment for found in committed for segment in found.progress.segments}
    segments = storage.list_files(storage.join(run_dir, "metrics"), suffix=".jsonl")
    return orphans + [
        Orphan(file.uri, SEGMENT, file.size_bytes, storage.age_s(file.uri))
        for file in segments
        if file.path not in counted
    ]


def _refuse(text: str) -> None:
    raise CheckpointError(text)


def _runs_below(root: str) -> list[str]:
    """Directories one below `root` that hold a run.json."""
    found = storage.glob_files(storage.join(root, "*", "run.json"))
    return [file.uri.removesuffix("/run.json") for file in found]


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
