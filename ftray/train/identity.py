"""Who a run is: its directory in storage, its settings written once, whether it is finished. No Ray, no torch."""

from __future__ import annotations

import importlib.metadata
import json

from ftray import config, storage
from ftray.errors import ConfigError
from ftray.train.timeline import Found, list_checkpoints, merge_metrics

NAMED_VERSIONS = ("ftray", "ray", "torch", "transformers", "peft", "deepspeed")


def open_run(run: config.Run, parent: str | None = None) -> str:
    """Absolute directory of a run, writable and of the same identity; writes run.json unless it stands.

    parent: the checkpoint whose weights a new run starts from; it stands with the settings.

    Settings stand from the first checkpoint on: until then a run that was refused or stopped may be corrected under
    its name. Raises StorageError (not writable), ConfigError (the name belongs to a run with other settings or from
    another parent).
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
    if not storage.create_bytes(uri, text) and not list_checkpoints(run_dir):
        storage.write_bytes(uri, text)
    return run_dir


def parent_of(run_dir: str) -> str | None:
    """URI of the checkpoint that a run's weights come from; None where that is the base model."""
    uri = storage.join(run_dir, "run.json")
    if not storage.exists(uri):
        return None
    found: str | None = json.loads(storage.read_bytes(uri)).get("parent")
    return found


def _checked_parent(run_dir: str, parent: str | None) -> str | None:
    """The parent that a run has, or will have. Raises ConfigError for another one than it was started from."""
    if not list_checkpoints(run_dir):
        return parent or parent_of(run_dir)
    known = parent_of(run_dir)
    if parent is not None and parent != known:
        raise ConfigError(
            f"--from {parent}: the run in {run_dir} was started from {known or 'the base model'}; leave --from out to "
            "continue it, or choose another name"
        )
    return known


def check_identity(run: config.Run, run_dir: str) -> None:
    """Raises ConfigError, naming the keys, when the directory holds checkpoints of a run with other settings."""
    uri = storage.join(run_dir, "run.json")
    if not storage.exists(uri) or not list_checkpoints(run_dir):
        return
    try:
        known = config.parse_run(json.loads(storage.read_bytes(uri))["config"], uri)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{uri} is damaged; restore it, or choose another name") from None
    if known.config_hash != run.config_hash:
        keys = "; ".join(config.differing_keys(known.identity(), run.identity()))
        raise ConfigError(
            f"the run '{run.name}' in {run_dir} was started with other settings: {keys}. Choose another name, "
            "set these back, or delete that directory"
        )


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's result."""
    return {name: importlib.metadata.version(name) for name in NAMED_VERSIONS}


def finished_checkpoint(run: config.Run, verify: bool) -> Found | None:
    """The last checkpoint of a run that is trained to its end, else None. verify: read it, None if it is damaged.

    Raises ConfigError for another identity.
    """
    run_dir = storage.absolute(run.directory)
    check_identity(run, run_dir)
    found = list_checkpoints(run_dir)
    if not found or not found[0].progress.finished or (verify and storage.verify_directory(found[0].uri)):
        return None
    if not storage.exists(storage.join(run_dir, "metrics.jsonl")):  # its driver died at the very end
        merge_metrics(run_dir, found[0].progress)
    return found[0]
