"""The runs of a directory and their state, for `ftray runs list`. Needs neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ftray import storage
from ftray.driver.garbage_collection import runs_below
from ftray.driver.run_record import read_identity
from ftray.errors import ConfigError, FtrayError
from ftray.train.checkpoint.catalog import list_checkpoints


@dataclass(frozen=True)
class RunSummary:
    """A run in a list.

    Attributes:
        name: Its name.
        directory: Where it is.
        state: `running`, `finished`, `stopped`, or `new` without a checkpoint.
        step: Step of the newest checkpoint.
        eval_loss: The best eval loss, if any was computed.
        method: `method.type`.
        base: `model.base`.
    """

    name: str
    directory: str
    state: str
    step: int
    eval_loss: float | None
    method: str
    base: str


def describe_runs(directory: str, warn: Callable[[str], None]) -> list[RunSummary]:
    """The runs directly below a directory, by name. Unreadable ones are reported and left out.

    Raises:
        ConfigError: There is none.
    """
    folders = runs_below(storage.absolute(directory))
    if not folders:
        raise ConfigError(f"{directory} contains no run; give the directory that a run file names as storage")
    runs = []
    for folder in folders:
        try:
            runs.append(_describe(folder))
        except FtrayError as err:
            warn(f"{folder} is left out: {err}")
    return runs


def _describe(folder: str) -> RunSummary:
    identity = read_identity(folder) or {}
    settings = identity.get("config") or {}
    checkpoints = list_checkpoints(folder)
    newest = checkpoints[0] if checkpoints else None
    if storage.live_owner(folder):
        state = "running"
    elif newest is None:
        state = "new"
    else:
        state = "finished" if newest.progress.finished else "stopped"
    best = newest.progress.best if newest else None
    return RunSummary(
        folder.rpartition("/")[2],
        folder,
        state,
        newest.step if newest else 0,
        float(best["loss"]) if best else None,
        str((settings.get("method") or {}).get("type", "lora")),
        str((settings.get("model") or {}).get("base", "")),
    )
