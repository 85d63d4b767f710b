"""Exports a run's best checkpoint to `<run>/model/`: the adapter, and the merged weights in `merged/`; committed as one."""

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
    """Writes the model directory unless it holds this checkpoint already.

    Args:
        run: The run's configuration.
        run_dir: The run's directory.
        console: Shows what is done.
        describe: Returns files by name that go beside the weights, from the checkpoint and whether the weights are whole.
        step: Exports the checkpoint of this step instead of the best one.

    Returns:
        URI of the whole weights; of the adapter for a prompt-tuned model, which cannot be merged.

    Raises:
        ConfigError: There is no checkpoint.
        CheckpointError: The checkpoint is damaged.
    """
    checkpoint = best_checkpoint(run_dir, step)
    target = storage.join(run_dir, "model")
    if _holds(target, checkpoint):
        console.say(f"the model of step {checkpoint.step} already exists: {target}")
    else:
        console.say(f"export: writing the model of step {checkpoint.step} to {target}")
        with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
            _write(run, checkpoint, Path(scratch))
            for directory in (Path(scratch), Path(scratch, "merged")):
                is_whole = run.method.type == "full" or directory.name == "merged"
                for name, text in (describe(checkpoint, is_whole) if describe and directory.is_dir() else {}).items():
                    (directory / name).write_bytes(text)
            storage.delete_tree(target)
            meta = {"step": checkpoint.step, "run": run.name, "base": run.model.base, **checkpoint.meta}
            if not storage.commit_directory(scratch, target, meta):
                raise RunError(f"{target} was written by another process; run the command again")
    return whole_weights(run, run_dir)


def whole_weights(run: config.RunConfig, run_dir: str) -> str:
    """URI of a run's whole weights, whether they exist or not."""
    parts = ("model",) if run.method.type in ("full", "prompt-tuning") else ("model", "merged")
    return storage.join(run_dir, *parts)


def fetch_part(uri: str, scratch: Path, alone: bool = False) -> Path:
    """Copies the committed directory at `uri`, or `merged/` in one, to a directory below `scratch`.

    alone: Leaves out `merged/` beside an adapter. Raises CheckpointError, StorageError.
    """
    copy = scratch / "copy"
    storage.fetch_directory(uri.removesuffix("/merged"), copy)
    if uri.endswith("/merged"):
        return copy / "merged"
    if alone:
        shutil.rmtree(copy / "merged", ignore_errors=True)
    return copy


def _holds(target: str, checkpoint: CheckpointRef) -> bool:
    if storage.verify_directory(target):
        return False  # missing or damaged
    manifest = storage.read_manifest(target)
    return manifest is not None and manifest["meta"].get("step") == checkpoint.step


def _write(run: config.RunConfig, checkpoint: CheckpointRef, directory: Path) -> None:
    if run.method.type == "full":
        write_whole(load_tuned(run, checkpoint, "fp32"), run.model, run.train.precision, directory)
        return
    write_adapter(load_tuned(run, checkpoint, "fp32"), run.model, run.train.precision, directory)
    if run.method.type != "prompt-tuning":
        whole = load_tuned(run, checkpoint, "fp32", to_merge=True)
        write_whole(whole, run.model, run.train.precision, directory / "merged")
