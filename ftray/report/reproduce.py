"""The same run once more: whether all that it came from is as it was, and whether the same came of it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from ftray import config, storage
from ftray.console import Console
from ftray.data.prepare import PreparedData, prepare_data
from ftray.driver.lineage import changed_files, environment, environment_changes, read_lineage
from ftray.errors import ConfigError, DataError, RunError
from ftray.events.event_log import read_events
from ftray.events.types import TrainingStarted
from ftray.model.load import absolute_base, load_tokenizer, tokenizer_hash
from ftray.train.checkpoint.catalog import CheckpointRef, list_checkpoints, read_metrics

SHOWN = 5  # changes that are named


def renamed(old: config.RunConfig, name: str | None) -> config.RunConfig:
    """The same settings under another name. Raises ConfigError for the run's own, or one that is no name."""
    name = name or f"{old.name[:57]}-again"
    if name == old.name:
        raise ConfigError(f"--name {name} is the run's own; give another")
    return config.parse_run({**old.model_dump(mode="json"), "name": name}, "--name")


def check_before(old: config.RunConfig, old_dir: str, other_environment: bool, console: Console) -> dict[str, Any]:
    """The run's lineage, whose files are all there and whose packages are here; without reading the data.

    other_environment: only tell what is other than it was. Raises ConfigError, DataError naming what changed.
    """
    known = read_lineage(old_dir)
    if known is None:
        raise ConfigError(f"{old_dir} does not say what it was trained from (run.json has no lineage); train it anew")
    if known["config_hash"] != old.config_hash:
        raise ConfigError("reproduce takes a run as it is; leave overrides out, or train with them under another name")
    if changes := environment_changes(known["environment"], environment()):
        if not other_environment:
            raise ConfigError(
                f"this is not the environment of the run: {_some(changes)}. Go back to it, or give --other-environment"
            )
        console.warn(f"another environment than the run's: {_some(changes)}")
    if changes := changed_files(known, old):
        raise DataError(f"what the run was trained from changed: {_some(changes)}; restore it")
    return known


def same_data(run: config.RunConfig, run_dir: str, console: Console) -> PreparedData:
    """The new run's data, indexed. Needs a started Ray."""
    load = partial(load_tokenizer, absolute_base(run.model))
    return prepare_data(run, run_dir, console, load, tokenizer_hash(load()))


def check_data(known: dict[str, Any], run: config.RunConfig, data: PreparedData) -> None:
    """Raises DataError, naming the files, where they give other rows than they did."""
    if changes := changed_files(known, run, data):
        raise DataError(f"what the run was trained from changed: {_some(changes)}; restore it")


def _some(changes: list[str]) -> str:
    more = f", and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return ", ".join(changes[:SHOWN]) + more


def compare_runs(old_dir: str, new_dir: str) -> str:
    """A sentence: whether rows, losses and weights are the same. Raises RunError where they had to be and are not."""
    old, new = ({line["step"]: line for line in read_metrics(each)} for each in (old_dir, new_dir))
    steps = sorted(old.keys() & new.keys())
    if any(old[s].get("sequences") != new[s].get("sequences") for s in steps):
        raise RunError(f"{new_dir} took other rows than {old_dir}")
    apart = [s for s in steps if old[s]["loss"] != new[s]["loss"]]
    at, sums, again = _last_common(old_dir, new_dir)
    if not apart and sums and sums == again:
        return f"the same once more: rows and losses of {len(steps)} steps, and the weights of step {at}, bit for bit ({sums[0]})"
    gaps = [abs(old[s]["loss"] - new[s]["loss"]) for s in apart if None not in (old[s]["loss"], new[s]["loss"])]
    most = max(gaps, default=0.0) if len(gaps) == len(apart) else math.nan  # one was not finite
    said = f"rows of {len(steps)} steps are the same; losses differ by at most {most:.3g}, first at step {min(apart, default=at)}"
    events = [logged.event for each in (old_dir, new_dir) for logged in read_events(each)]
    starts = [event for event in events if isinstance(event, TrainingStarted)]
    if {start.device for start in starts} == {"CPU"} and len({start.workers for start in starts}) == 1:
        raise RunError(f"{said}, although both were trained on CPUs by as many workers")
    return f"{said}: sums on GPUs, and over other numbers of workers, are not bit for bit the same"


def _last_common(old_dir: str, new_dir: str) -> tuple[int, list[str], list[str]]:
    """The last step of which both have a checkpoint, and the sha256 of the weights' files of each."""
    old, new = ({found.step: found for found in list_checkpoints(each)} for each in (old_dir, new_dir))
    if not (common := old.keys() & new.keys()):
        return 0, [], []
    return max(common), _sums(old[max(common)]), _sums(new[max(common)])


def _sums(found: CheckpointRef) -> list[str]:
    manifest = storage.read_manifest(found.uri)
    files = manifest["files"] if manifest else {}
    return [files[name]["sha256"] for name in sorted(files) if name.endswith(".safetensors")]
