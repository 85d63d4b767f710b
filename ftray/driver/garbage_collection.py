"""Garbage collection: uncommitted checkpoints, metrics off the committed timeline, unfinished uploads, temporary files.

It takes a run's lease while it works, so a run with a live owner is skipped. Files behind symbolic links are skipped, too: they
may belong to another run. A run that cannot be cleaned does not stop the others. No Ray, no torch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ftray import storage
from ftray.console import Console
from ftray.errors import CheckpointError, ConfigError, RunHeldError, StorageError
from ftray.train.checkpoint.catalog import scan_checkpoints

STAGED_S = 600.0  # a temporary file older than this has no writer: writers move them within seconds


@dataclass(frozen=True)
class Orphan:
    """Something that no run needs.

    Attributes:
        uri: Of a directory or a file.
        kind: What it is.
        size_bytes: Its size.
        age_s: Age of its newest file.
        upload: The unfinished upload, if it is one.
    """

    uri: str
    kind: str
    size_bytes: int
    age_s: float
    upload: storage.Upload | None = None


def collect_garbage(location: str, older_than_s: float, dry_run: bool, console: Console) -> int:
    """Cleans a run, or all runs below a directory; returns the bytes that were freed, or could be.

    A run that cannot be cleaned is reported and skipped. Raises ConfigError if there is no run, StorageError.
    """
    root = storage.absolute(location)
    runs = [root] if storage.exists(storage.join(root, "run.json")) else runs_below(root)
    if not runs:
        raise ConfigError(f"{location} is neither the directory of a run nor one that contains runs; correct the path")
    total = 0
    for run_dir in runs:
        if (link := storage.link_on_the_way(root, run_dir)) is not None:
            console.say(f"skipped: {link} is a symbolic link; give the directory that it points to")
            continue
        try:
            total += _clean_run(run_dir, older_than_s, dry_run, console)
        except RunHeldError as err:
            console.say(f"skipped: {err}")
        except (CheckpointError, StorageError) as err:
            console.warn(f"{run_dir} was not cleaned: {err}")
    console.say(f"{len(runs)} runs, {_size(total)} {'could be freed' if dry_run else 'freed'}")
    return total


def _clean_run(run_dir: str, older_than_s: float, dry_run: bool, console: Console) -> int:
    """Cleans one run; returns the bytes that were freed, or could be. Raises RunHeldError, StorageError."""
    total = 0
    with storage.acquire_lease(run_dir, warn=console.warn):
        orphans = find_orphans(run_dir) + _uploads(run_dir, console) + _staged(run_dir)
        for orphan in orphans:
            if orphan.age_s < max(older_than_s, STAGED_S if orphan.kind == STAGED else 0.0):
                continue
            if orphan.upload is None and (link := storage.link_on_the_way(run_dir, orphan.uri)) is not None:
                console.say(f"skipped: {orphan.uri} is behind the symbolic link {link}")
                continue
            console.say(
                f"{'would delete' if dry_run else 'deleted'}: {orphan.uri} ({orphan.kind}, {_size(orphan.size_bytes)})"
            )
            total += orphan.size_bytes
            if not dry_run:
                _remove(orphan)
    return total


SEGMENT = "metrics off the committed timeline"
STAGED = "temporary file of a killed writer"


def find_orphans(run_dir: str) -> list[Orphan]:
    """Uncommitted checkpoint directories, and metrics segments that no committed checkpoint refers to.

    A checkpoint with a damaged or lost manifest is kept for inspection. Without a sound checkpoint all segments are kept.
    """
    files = defaultdict(list)
    for file in storage.list_files(storage.join(run_dir, "checkpoints")):
        files[file.path.split("/")[0]].append(file)
    orphans = []
    for name, contents in sorted(files.items()):
        marks = {f"{name}/{storage.MANIFEST}", f"{name}/{storage.MARK}"}
        if not any(file.path in marks for file in contents):
            age_s = min(storage.age_s(file.uri) for file in contents)
            size_bytes = sum(file.size_bytes for file in contents)
            orphans.append(Orphan(storage.join(run_dir, "checkpoints", name), "never committed", size_bytes, age_s))
    committed, damaged = scan_checkpoints(run_dir)
    if damaged or not committed:
        return orphans  # it is unknown which segments are needed
    needed = {segment for checkpoint in committed for segment in checkpoint.progress.segments}
    segments = storage.list_files(storage.join(run_dir, "metrics"), suffix=".jsonl")
    return orphans + [
        Orphan(file.uri, SEGMENT, file.size_bytes, storage.age_s(file.uri))
        for file in segments
        if file.path not in needed
    ]


def _staged(run_dir: str) -> list[Orphan]:
    """Temporary files of killed writers. Nobody writes the run now: garbage collection holds its lease."""
    return [Orphan(file.uri, STAGED, file.size_bytes, storage.age_s(file.uri)) for file in storage.list_staged(run_dir)]


def _uploads(run_dir: str, console: Console) -> list[Orphan]:
    """Uploads of a killed writer; a warning if the store does not list them."""
    try:
        uploads = storage.list_uploads(run_dir)
    except StorageError as err:
        console.warn(f"unfinished uploads cannot be listed: {err}")
        return []
    return [Orphan(each.uri, "unfinished upload", each.size_bytes, each.age_s, each) for each in uploads]


def _remove(orphan: Orphan) -> None:
    if orphan.upload is not None:
        storage.abort_upload(orphan.upload)
    elif orphan.kind in (SEGMENT, STAGED):
        storage.delete(orphan.uri)
    else:
        storage.delete_tree(orphan.uri)


def runs_below(root: str) -> list[str]:
    """Directories directly below `root` with a run.json."""
    files = storage.glob_files(storage.join(root, "*", "run.json"))
    return [file.uri.removesuffix("/run.json") for file in files]


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
