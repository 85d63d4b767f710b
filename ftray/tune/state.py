"""The state of a sweep in storage: trials, their values, each eval loss and the decision that followed it.

One file, `<run>/tune/state.json`, is written after each change. The same command continues from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ftray import config, storage
from ftray.errors import ConfigError

VERSION = 1
Status = Literal["running", "done", "stopped", "failed"]
FREE = {"num_trials", "max_concurrent"}  # keys of `tune` that may change when a sweep is resumed


@dataclass(frozen=True)
class EvalReport:
    """An eval loss of a trial.

    Attributes:
        at: Position among all reports of the sweep.
        step: Optimizer steps done.
        share: `step` as a share of the trial's steps, 0 to 1.
        loss: Eval loss.
        stop: Whether the scheduler stopped the trial here.
    """

    at: int
    step: int
    share: float
    loss: float
    stop: bool


@dataclass
class TrialRecord:
    """A trial.

    Attributes:
        params: Values by dotted key.
        status: `running` covers every trial that has not ended, whether or not it trains at the moment.
    """

    number: int
    params: dict[str, Any]
    status: Status = "running"
    num_steps: int = 0
    reports: list[EvalReport] = field(default_factory=list)
    error: str = ""

    @property
    def name(self) -> str:
        """Name of the trial's run."""
        return f"trial-{self.number:03d}"

    @property
    def best(self) -> EvalReport | None:
        """The report with the lowest eval loss."""
        return min((r for r in self.reports if math.isfinite(r.loss)), key=lambda r: r.loss, default=None)

    @property
    def step(self) -> int:
        """Steps known to be done."""
        return self.num_steps if self.status == "done" else max((r.step for r in self.reports), default=0)

    def report_of(self, step: int) -> EvalReport | None:
        """The report of a step."""
        return next((report for report in self.reports if report.step == step), None)


@dataclass
class SweepState:
    """A sweep.

    Attributes:
        settings: Settings that must not change when the sweep is resumed.
        data_hash: Hash of the data, which must not change either. Empty until the data is indexed.
    """

    settings: dict[str, Any]
    trials: list[TrialRecord] = field(default_factory=list)
    data_hash: str = ""

    def reports(self) -> list[tuple[TrialRecord, EvalReport]]:
        """All reports in the order in which they arrived."""
        return sorted(((t, r) for t in self.trials for r in t.reports), key=lambda pair: pair[1].at)

    def winner(self) -> TrialRecord | None:
        """The trial with the lowest eval loss among those trained to the end, or among all if none was."""
        ended = [t for t in self.trials if t.status == "done" and t.best] or [
            t for t in self.trials if t.status != "failed" and t.best
        ]
        return min(ended, key=lambda t: (t.best.loss, t.number) if t.best else (math.inf, 0), default=None)


def settings_of(run: config.RunConfig) -> dict[str, Any]:
    """The settings that must not change when a sweep is resumed."""
    assert run.tune is not None
    every = run.evaluate.model_dump(mode="json", include={"every", "early_stopping"})
    tune = run.tune.model_dump(mode="json", exclude=FREE, exclude_none=True)
    return {**run.identity(), "evaluate": every, "tune": tune}


def open_state(run: config.RunConfig, tune_dir: str) -> SweepState:
    """Reads the state of a sweep, or makes a new one.

    Raises:
        ConfigError: The sweep was started with other settings (the message names the keys), or its state is damaged.
    """
    uri, settings = _uri(tune_dir), settings_of(run)
    try:
        state = _read(uri)
    except (storage.DamagedFile, ValueError) as err:
        raise ConfigError(
            f"{uri} is damaged ({err}). Restore it, or delete {tune_dir} to start the sweep again"
        ) from None
    if state is None:
        return SweepState(settings)
    if differing := config.differing_keys(state.settings, settings):
        raise ConfigError(
            f"the sweep in {tune_dir} was started with other settings: {'; '.join(differing)}. Choose another name, "
            "restore these settings, or delete the directory"
        )
    return state


def read_state(tune_dir: str, warn: Callable[[str], None] | None = None) -> SweepState | None:
    """Reads the state of a sweep; None if there is none. `warn` receives a message if it is damaged."""
    try:
        return _read(_uri(tune_dir))
    except (storage.DamagedFile, ValueError) as err:
        if warn is not None:
            warn(f"{_uri(tune_dir)} is damaged ({err}). Restore it, or delete {tune_dir} to start the sweep again")
        return None


def _read(uri: str) -> SweepState | None:
    tree = storage.find_object(uri)
    return None if tree is None else storage.parse_as(SweepState, tree)


def save_state(state: SweepState, tune_dir: str) -> None:
    """Writes the state.

    Raises:
        StorageError: The file could not be written.
    """
    tree = {"version": VERSION, **asdict(state)}
    storage.write_bytes(_uri(tune_dir), json.dumps(tree, indent=1).encode())


def _uri(tune_dir: str) -> str:
    return storage.join(tune_dir, "state.json")
