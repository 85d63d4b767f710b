"""What is known of a sweep, in storage: its trials, their values, each held-out loss and what was decided after it.

One file, `<run>/tune/state.json`, written after each change; what is in it was decided, so that the same command
continues from it. Knows storage and plain values; nothing of who decides.
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
FREE = {"num_trials", "max_concurrent"}  # keys of `tune` that may change while a sweep goes on


@dataclass(frozen=True)
class EvalReport:
    """A held-out loss. at: its place among all reports of the sweep. share: of the trial's steps. stop: what was decided."""

    at: int
    step: int
    share: float
    loss: float
    stop: bool


@dataclass
class TrialRecord:
    """A trial. params: values by dotted key. running: not ended yet, whether or not it trains just now."""

    number: int
    params: dict[str, Any]
    status: Status = "running"
    num_steps: int = 0
    reports: list[EvalReport] = field(default_factory=list)
    error: str = ""

    @property
    def name(self) -> str:
        """Name of its run."""
        return f"trial-{self.number:03d}"

    @property
    def best(self) -> EvalReport | None:
        """Its lowest held-out loss."""
        return min((r for r in self.reports if math.isfinite(r.loss)), key=lambda r: r.loss, default=None)

    @property
    def step(self) -> int:
        """Steps that are known to be done."""
        return self.num_steps if self.status == "done" else max((r.step for r in self.reports), default=0)

    def report_of(self, step: int) -> EvalReport | None:
        """What was reported at a step."""
        return next((report for report in self.reports if report.step == step), None)


@dataclass
class SweepState:
    """A sweep. settings, data_hash: what must be the same when it is continued; the hash is known once data is indexed."""

    settings: dict[str, Any]
    trials: list[TrialRecord] = field(default_factory=list)
    data_hash: str = ""

    def reports(self) -> list[tuple[TrialRecord, EvalReport]]:
        """All reports in the order in which they came."""
        return sorted(((t, r) for t in self.trials for r in t.reports), key=lambda pair: pair[1].at)

    def winner(self) -> TrialRecord | None:
        """The trial with the lowest held-out loss, of those trained to the end; where there is none, of all."""
        ended = [t for t in self.trials if t.status == "done" and t.best] or [
            t for t in self.trials if t.status != "failed" and t.best
        ]
        return min(ended, key=lambda t: (t.best.loss, t.number) if t.best else (math.inf, 0), default=None)


def settings_of(run: config.RunConfig) -> dict[str, Any]:
    """What must be the same when a sweep is continued."""
    assert run.tune is not None
    every = run.evaluate.model_dump(mode="json", include={"every", "early_stopping"})
    tune = run.tune.model_dump(mode="json", exclude=FREE, exclude_none=True)
    return {**run.identity(), "evaluate": every, "tune": tune}


def open_state(run: config.RunConfig, tune_dir: str) -> SweepState:
    """The state of a sweep that was started, or a new one.

    Raises ConfigError, naming the keys, for a sweep that was started with other settings.
    """
    uri, settings = _uri(tune_dir), settings_of(run)
    try:
        state = _read(uri)
    except (storage.DamagedFile, ValueError) as err:
        raise ConfigError(f"{uri} is damaged ({err}); restore it, or delete {tune_dir} to sweep anew") from None
    if state is None:
        return SweepState(settings)
    if differing := config.differing_keys(state.settings, settings):
        raise ConfigError(
            f"the sweep in {tune_dir} was started with other settings: {'; '.join(differing)}. Choose another name, "
            "set these back, or delete that directory"
        )
    return state


def read_state(tune_dir: str, warn: Callable[[str], None] | None = None) -> SweepState | None:
    """The state of a sweep, if there is one that can be read. warn: told of one that can't be."""
    try:
        return _read(_uri(tune_dir))
    except (storage.DamagedFile, ValueError) as err:
        if warn is not None:
            warn(f"{_uri(tune_dir)} is damaged ({err}); restore it, or delete {tune_dir} to sweep anew")
        return None


def _read(uri: str) -> SweepState | None:
    tree = storage.find_object(uri)
    return None if tree is None else storage.parse_as(SweepState, tree)


def save_state(state: SweepState, tune_dir: str) -> None:
    """Writes the state. Raises StorageError."""
    tree = {"version": VERSION, **asdict(state)}
    storage.write_bytes(_uri(tune_dir), json.dumps(tree, indent=1).encode())


def _uri(tune_dir: str) -> str:
    return storage.join(tune_dir, "state.json")
