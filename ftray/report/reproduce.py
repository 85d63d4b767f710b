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

SHOWN = 5  # changes that a message lists


def renamed(old: config.RunConfig, name: str | None) -> config.RunConfig:
    """The same settings under another name. Raises ConfigError for the run's own or an invalid name."""
    name = name or f"{old.name[:57]}-again"
    if name == old.name:
        raise ConfigError(f"--name {name} is the run's own name; use another one")
    return config.parse_run({**old.model_dump(mode="json"), "name": name}, "--name")


def check_before(old: config.RunConfig, old_dir: str, other_environment: bool, console: Console) -> dict[str, Any]:
    """Returns the run's lineage after checking files and packages, without reading the data.

    Args:
        old: The run.
        old_dir: Its directory.
        other_environment: Only warn about a different environment.
        console: For warnings.

    Raises:
        ConfigError: The environment or the settings differ.
        DataError: A file changed.
    """
    known = read_lineage(old_dir)
    if known is None:
        raise ConfigError(f"{old_dir} has no lineage in run.json; train the run again")
    if known["config_hash"] != old.config_hash:
        raise ConfigError("reproduce takes no overrides; remove them, or train with them under another name")
    if changes := environment_changes(known["environment"], environment()):
        if not other_environment:
            raise ConfigError(
                f"the environment differs from the run's: {_some(changes)}; restore it, or use --other-environment"
            )
        console.warn(f"the environment differs from the run's: {_some(changes)}")
    if changes := changed_files(known, old):
        raise DataError(f"the run's inputs changed: {_some(changes)}; restore them")
    return known


def same_data(run: config.RunConfig, run_dir: str, console: Console) -> PreparedData:
    """The new run's data, indexed. Needs a started Ray."""
    load = partial(load_tokenizer, absolute_base(run.model))
    return prepare_data(run, run_dir, console, load, tokenizer_hash(load()))


def check_data(known: dict[str, Any], run: config.RunConfig, data: PreparedData) -> None:
    """Raises DataError with the files that yield other packed sequences than before."""
    if changes := changed_files(known, run, data):
        raise DataError(f"the run's inputs changed: {_some(changes)}; restore them")


def _some(changes: list[str]) -> str:
    more = f", and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return ", ".join(changes[:SHOWN]) + more


def compare_reproduction(old_dir: str, new_dir: str) -> str:
    """Compares data, losses and weights in one sentence. Raises RunError if they differ but should not."""
    old, new = ({line["step"]: line for line in read_metrics(each)} for each in (old_dir, new_dir))
    steps = sorted(old.keys() & new.keys())
    if any(old[s].get("sequences") != new[s].get("sequences") for s in steps):
        raise RunError(f"{new_dir} trained on other packed sequences than {old_dir}")
    apart = [s for s in steps if old[s]["loss"] != new[s]["loss"]]
    at, sums, again = _last_common(old_dir, new_dir)
    if not apart and sums and sums == again:
        return (
            f"reproduced bit for bit: data and losses of {len(steps)} steps, and the weights of step {at} ({sums[0]})"
        )
    gaps = [abs(old[s]["loss"] - new[s]["loss"]) for s in apart if None not in (old[s]["loss"], new[s]["loss"])]
    most = max(gaps, default=0.0) if len(gaps) == len(apart) else math.nan  # one was not finite
    first = min(apart, default=at)
    said = f"the data of {len(steps)} steps is the same; losses differ by at most {most:.3g} from step {first} on"
    events = [logged.event for each in (old_dir, new_dir) for logged in read_events(each)]
    starts = [event for event in events if isinstance(event, TrainingStarted)]
    if {start.device for start in starts} == {"CPU"} and len({start.workers for start in starts}) == 1:
        raise RunError(f"{said}, even though both were trained on CPUs with the same number of workers")
    return f"{said}: sums on GPUs, or over another number of workers, are not bit-identical"


def _last_common(old_dir: str, new_dir: str) -> tuple[int, list[str], list[str]]:
    """The last step that both have a checkpoint of, and the sha256 of its weight files in each."""
    old, new = ({checkpoint.step: checkpoint for checkpoint in list_checkpoints(each)} for each in (old_dir, new_dir))
    if not (common := old.keys() & new.keys()):
        return 0, [], []
    return max(common), _sums(old[max(common)]), _sums(new[max(common)])


def _sums(checkpoint: CheckpointRef) -> list[str]:
    manifest = storage.read_manifest(checkpoint.uri)
    files = manifest["files"] if manifest else {}
    return [files[name]["sha256"] for name in sorted(files) if name.endswith(".safetensors")]
