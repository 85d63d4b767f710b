"""From a run's best checkpoint to `<run>/model/`: the adapter and, in `merged/`, whole weights; committed as one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ftray import config, storage
from ftray.console import Console
from ftray.errors import RunError
from ftray.model.export import write_adapter, write_whole
from ftray.train.checkpoint.catalog import CheckpointRef, best_checkpoint
from ftray.train.checkpoint.restore import load_tuned

Describe = Callable[[CheckpointRef, bool], Mapping[str, bytes]]


def export(
    run: config.RunConfig, run_dir: str, console: Console, describe: Describe | None = None, step: int | None = None
) -> str:
    """Writes the model directory unless it holds this checkpoint already; returns the URI of the whole weights.

    Of a prompt-tuned model, which can't be merged, that of the adapter. describe: files that tell where the model comes
    from, by name, beside the weights; told whether those are whole. step: of the checkpoint that is taken; the best if left out.

    Raises ConfigError without a checkpoint, CheckpointError for a damaged one.
    """
    found = best_checkpoint(run_dir, step)
    target = storage.join(run_dir, "model")
    if _holds(target, found):
        console.say(f"the model of step {found.step} is there already: {target}")
    else:
        console.say(f"export: writing the model of step {found.step} to {target}")
        with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
            _write(run, found, Path(scratch))
            for place in (Path(scratch), Path(scratch, "merged")):
                is_whole = run.method.type == "full" or place.name == "merged"
                for name, text in (describe(found, is_whole) if describe and place.is_dir() else {}).items():
                    (place / name).write_bytes(text)
            storage.delete_tree(target)
            meta = {"step": found.step, "run": run.name, "base": run.model.base, **found.meta}
            if not storage.commit_directory(scratch, target, meta):
                raise RunError(f"{target} was written by another process; run the command again")
    return whole_weights(run, run_dir)


def whole_weights(run: config.RunConfig, run_dir: str) -> str:
    """URI of a run's whole weights, there or not."""
    parts = ("model",) if run.method.type in ("full", "prompt-tuning") else ("model", "merged")
    return storage.join(run_dir, *parts)


def fetch_part(uri: str, scratch: Path, alone: bool = False) -> Path:
    """A local copy, below `scratch`, of the committed directory at `uri`, or of `merged/` in one.

    alone: an adapter's comes without its `merged/`. Raises CheckpointError, StorageError.
    """
    copy = scratch / "copy"
    storage.fetch_directory(uri.removesuffix("/merged"), copy)
    if uri.endswith("/merged"):
        return copy / "merged"
    if alone:
        shutil.rmtree(copy / "merged", ignore_errors=True)
    return copy


def _holds(target: str, found: CheckpointRef) -> bool:
    if storage.verify_directory(target):
        return False  # not there, or damaged
    manifest = storage.read_manifest(target)
    return manifest is not None and manifest["meta"].get("step") == found.step


def _write(run: config.RunConfig, found: CheckpointRef, directory: Path) -> None:
    if run.method.type == "full":
        write_whole(load_tuned(run, found, "fp32"), run.model, run.train.precision, directory)
        return
    write_adapter(load_tuned(run, found, "fp32"), run.model, run.train.precision, directory)
    if run.method.type != "prompt-tuning":
        whole = load_tuned(run, found, "fp32", to_merge=True)
        write_whole(whole, run.model, run.train.precision, directory / "merged")
