"""The run record: `run.json` with the run's settings, written once, and checks of its identity. No Ray, no torch."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

from ftray import config, storage
from ftray.errors import ConfigError
from ftray.train.checkpoint.catalog import CheckpointRef, has_begun, list_checkpoints, merge_metrics, scan_checkpoints

REMEDY = "restore it, delete it so that it is written again from the run file, or choose another name"
NAMED_VERSIONS = ("ftray", "ray", "torch", "transformers", "peft", "deepspeed")


def open_run(run: config.RunConfig, parent: str | None = None) -> str:
    """Opens a run's directory, and writes run.json unless it is fixed.

    Settings are fixed from the first checkpoint on; until then a run that was refused or stopped may be corrected under its
    name.

    Args:
        run: The run's configuration.
        parent: The checkpoint whose weights a new run starts from.

    Returns:
        The run's directory, absolute.

    Raises:
        StorageError: The directory is not writable.
        ConfigError: The name belongs to a run with other settings or another parent.
    """
    run_dir = storage.absolute(run.directory)
    storage.check_writable(run_dir)
    check_identity(run, run_dir)
    parent = _checked_parent(run_dir, parent)
    tree = {"config": run.model_dump(mode="json"), "config_hash": run.config_hash, "versions": versions()}
    if parent is not None:
        tree["parent"] = parent
    uri = storage.join(run_dir, "run.json")
    text = json.dumps(tree, indent=1).encode()
    if not storage.create_bytes(uri, text) and not has_begun(run_dir):
        storage.write_bytes(uri, text)
    return run_dir


def read_identity(run_dir: str) -> dict[str, Any] | None:
    """The content of run.json; None without the file. Raises DamagedFile, StorageError."""
    uri = storage.join(run_dir, "run.json")
    tree = storage.find_object(uri, REMEDY)
    if tree is not None and not isinstance(tree.get("config"), dict):
        raise storage.DamagedFile(f"{uri} is damaged (it has no config); {REMEDY}")
    return tree


def parent_of(run_dir: str) -> str | None:
    """URI of the checkpoint that a run started from; None if it started from the base model."""
    parent = (read_identity(run_dir) or {}).get("parent")
    return parent if isinstance(parent, str) else None


def _checked_parent(run_dir: str, parent: str | None) -> str | None:
    """The parent of a run. Raises ConfigError if it was started from another one."""
    if not has_begun(run_dir):
        return parent or (parent_of(run_dir) if storage.exists(storage.join(run_dir, "run.json")) else None)
    known = parent_of(run_dir)
    if parent is not None and parent != known:
        raise ConfigError(
            f"--from {parent}: the run in {run_dir} was started from {known or 'the base model'}; remove --from to continue "
            "it, or choose another name"
        )
    return known


def check_identity(run: config.RunConfig, run_dir: str) -> None:
    """Raises ConfigError, naming the keys, if the directory has checkpoints of a run with other settings."""
    checkpoints, damaged = scan_checkpoints(run_dir)
    if not checkpoints and not damaged:
        return
    uri = storage.join(run_dir, "run.json")
    tree = read_identity(run_dir)
    if tree is None:  # lost: the checkpoints still hold the hash of the settings
        hashes = {each.meta.get("config_hash", run.config_hash) for each in checkpoints}
        if hashes == {run.config_hash}:
            return
        raise ConfigError(
            f"{uri} is missing, and the checkpoints in {run_dir} may belong to other settings; restore it, or choose another "
            "name"
        )
    known = config.parse_run(tree["config"], uri)
    if known.config_hash != run.config_hash:
        keys = "; ".join(config.differing_keys(known.identity(), run.identity()))
        raise ConfigError(
            f"the run '{run.name}' in {run_dir} was started with other settings: {keys}. Choose another name, "
            "restore these settings, or delete the directory"
        )


def versions() -> dict[str, str]:
    """Installed versions of the packages that may change a run's result."""
    return {name: importlib.metadata.version(name) for name in NAMED_VERSIONS}


def finished_checkpoint(run: config.RunConfig, verify: bool) -> CheckpointRef | None:
    """The last checkpoint of a run that is trained to its end, else None.

    verify: Reads the checkpoint, and returns None if it is damaged. Raises ConfigError for other settings.
    """
    run_dir = storage.absolute(run.directory)
    check_identity(run, run_dir)
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints or not checkpoints[0].progress.finished:
        return None
    if verify and storage.verify_directory(checkpoints[0].uri):
        return None
    if not storage.exists(storage.join(run_dir, "metrics.jsonl")):  # its driver died at the very end
        merge_metrics(run_dir, checkpoints[0].progress)
    return checkpoints[0]
