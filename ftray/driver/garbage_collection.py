"""Sweeps what runs left behind: checkpoints that were never committed, metrics off the committed timeline, uploads that
broke off, writers' temporary files. No Ray, no torch.

A run with a live owner is left alone: the sweep takes the run's lease while it works. So is what lies behind a symbolic
link: it may belong to another run. A run that can't be swept doesn't keep the others from it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ftray import storage
from ftray.console import Console
from ftray.errors import CheckpointError, ConfigError, RunHeldError, StorageError
from ftray.train.checkpoint.catalog import scan_checkpoints

STAGED_S = 600.0  # a writer's temporary file grows, or is moved, within seconds; one older than this has no writer


@dataclass(frozen=True)
class Orphan:
    """What no run needs: its URI (a directory's, or a file's), what it is, size and age of its newest file.

    upload: the upload that it is, if it is one.
    """

    uri: str
    what: str
    size_bytes: int
    age_s: float
    upload: storage.Upload | None = None


def sweep_place(place: str, older_than_s: float, dry_run: bool, console: Console) -> int:
    """Sweeps a run, or all runs below a directory; returns the bytes that went, or would go.

    A run that can't be swept is named and passed over. Raises ConfigError where there is no run, StorageError.
    """
    root = storage.absolute(place)
    runs = [root] if storage.exists(storage.join(root, "run.json")) else _runs_below(root)
    if not runs:
        raise ConfigError(f"{place} is neither a run's directory nor one that holds runs; correct the path")
    total = 0
    for run_dir in runs:
        if (link := storage.link_on_the_way(root, run_dir)) is not None:
            console.say(f"left alone: {link} is a symbolic link; name the directory that it leads to")
            continue
        try:
            total += _sweep_run(run_dir, older_than_s, dry_run, console)
        except RunHeldError as err:
            console.say(f"left alone: {err}")
        except (CheckpointError, StorageError) as err:
            console.warn(f"{run_dir} was not swept: {err}")
    console.say(f"{len(runs)} runs, {_size(total)} {'could be freed' if dry_run else 'freed'}")
    return total


def _sweep_run(run_dir: str, older_than_s: float, dry_run: bool, console: Console) -> int:
    """Sweeps one run; returns the bytes that went, or would go. Raises RunHeldError, StorageError."""
    total = 0
    with storage.acquire_lease(run_dir, warn=console.warn):
        orphans = find_orphans(run_dir) + _uploads(run_dir, console) + _staged(run_dir)
        for orphan in orphans:
            if orphan.age_s < max(older_than_s, STAGED_S if orphan.what == STAGED else 0.0):
                continue
            if orphan.upload is None and (link := storage.link_on_the_way(run_dir, orphan.uri)) is not None:
                console.say(f"left alone: {orphan.uri}, which is reached through the symbolic link {link}")
                continue
            console.say(
                f"{'would go' if dry_run else 'gone'}: {orphan.uri} ({orphan.what}, {_size(orphan.size_bytes)})"
            )
            total += orphan.size_bytes
            if not dry_run:
                _remove(orphan)
    return total


SEGMENT = "metrics off the committed timeline"
STAGED = "temporary file of a writer that is gone"


def find_orphans(run_dir: str) -> list[Orphan]:
    """Checkpoint directories that were never committed, and metric segments that no committed checkpoint counts.

    A checkpoint whose manifest is damaged or lost is no orphan: somebody may want to look at it. Without any sound
    checkpoint all segments stay: they are what is left to tell of the run.
    """
    files = defaultdict(list)
    for file in storage.list_files(storage.join(run_dir, "checkpoints")):
        files[file.path.split("/")[0]].append(file)
    orphans = []
    for name, inside in sorted(files.items()):
        marks = {f"{name}/{storage.MANIFEST}", f"{name}/{storage.MARK}"}
        if not any(file.path in marks for file in inside):
            age_s = min(storage.age_s(file.uri) for file in inside)
            size_bytes = sum(file.size_bytes for file in inside)
            orphans.append(Orphan(storage.join(run_dir, "checkpoints", name), "never committed", size_bytes, age_s))
    committed, damaged = scan_checkpoints(run_dir)
    if damaged or not committed:
        return orphans  # which segments count is not known
    counted = {segment for found in committed for segment in found.progress.segments}
    segments = storage.list_files(storage.join(run_dir, "metrics"), suffix=".jsonl")
    return orphans + [
        Orphan(file.uri, SEGMENT, file.size_bytes, storage.age_s(file.uri))
        for file in segments
        if file.path not in counted
    ]


def _staged(run_dir: str) -> list[Orphan]:
    """Temporary files of writers that were killed. Nobody writes the run now: the sweep has its lease."""
    return [Orphan(file.uri, STAGED, file.size_bytes, storage.age_s(file.uri)) for file in storage.list_staged(run_dir)]


def _uploads(run_dir: str, console: Console) -> list[Orphan]:
    """Uploads of a writer that was killed; where the store doesn't let them be listed, a warning."""
    try:
        uploads = storage.list_uploads(run_dir)
    except StorageError as err:
        console.warn(f"unfinished uploads are not looked for: {err}")
        return []
    return [Orphan(found.uri, "upload that broke off", found.size_bytes, found.age_s, found) for found in uploads]


def _remove(orphan: Orphan) -> None:
    if orphan.upload is not None:
        storage.abort_upload(orphan.upload)
    elif orphan.what in (SEGMENT, STAGED):
        storage.delete(orphan.uri)
    else:
        storage.delete_tree(orphan.uri)


def _runs_below(root: str) -> list[str]:
    """Directories one below `root` that hold a run.json."""
    found = storage.glob_files(storage.join(root, "*", "run.json"))
    return [file.uri.removesuffix("/run.json") for file in found]


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
