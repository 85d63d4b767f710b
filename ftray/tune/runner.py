"""Runs a sweep: starts trials while the cluster has resources, each as a run on its own thread, until all have ended.

`driver.launch` trains a trial in the same way as `ftray train`, with checkpoints. After each eval its workers wait for the
scheduler's decision, so a stopped trial does no further step. This process owns the trials instead of Ray Tune's
controller, because Ray Tune over Ray Train leaks placement groups.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray

from ftray import config, storage
from ftray.console import Console, ProgressLine, printable
from ftray.data.loader import eval_table, share_sequences
from ftray.data.prepare import PreparedData, plan_sequences, prepare_data
from ftray.driver.launch import TrialHooks, train
from ftray.driver.lineage import what_changed
from ftray.driver.preflight import preflight
from ftray.driver.resources import check_resources, max_workers, usable_nodes
from ftray.driver.run_record import open_run
from ftray.driver.supervisor import CONTINUE, stop_signals
from ftray.errors import (
    ConfigError,
    DataError,
    FtrayError,
    Interrupted,
    Preempted,
    RunError,
    RunHeldError,
    StorageError,
)
from ftray.events.bus import EventBus, Subscriber
from ftray.events.types import EvalFinished, StepFinished, TrainingStarted
from ftray.model.load import absolute_base, load_tokenizer, template_hash, tokenizer_hash
from ftray.network import is_listening
from ftray.redact import redacted
from ftray.signals import is_termination
from ftray.tune.report import PageRenderer, as_table, write_report
from ftray.tune.scheduler import TrialPruner
from ftray.tune.search import propose
from ftray.tune.space import as_words, corners, number_of_trials, shares_data, trial_run
from ftray.tune.state import EvalReport, SweepState, TrialRecord, open_state, save_state

POLL_S = 0.2
SHARED_PART = 0.3  # share of the object store for the tokens that all trials use
NUM_LOSSES = 10  # evals per trial if evaluate.every is not set


def tune_directory(run_dir: str) -> str:
    """Directory of a run's sweep."""
    return storage.join(run_dir, "tune")


def sweep(
    run: config.RunConfig,
    run_dir: str,
    console: Console,
    target: str,
    lease: storage.Lease | None = None,
    follow: Callable[[config.RunConfig], Subscriber] | None = None,
    *,
    render_page: PageRenderer,
) -> TrialRecord:
    """Runs or resumes a sweep on a started Ray.

    Args:
        run: The run file, with a tune section.
        run_dir: Directory of the run.
        console: Output for the user.
        target: The run file as the user named it, for the printed command.
        lease: The run's lease.
        follow: Makes a subscriber to a trial's events, for metrics.
        render_page: Renders report.html.

    Returns:
        The trial with the lowest eval loss.

    Raises:
        ConfigError, DataError: Before any trial starts.
        Interrupted, Preempted: After all trials have committed a checkpoint.
        RunError: Every trial failed.
    """
    assert run.tune is not None  # `check_tune` validates it
    tune_dir = tune_directory(run_dir)
    state = open_state(run, tune_dir)
    total = number_of_trials(run.tune)
    left = total - sum(trial.status != "running" for trial in state.trials)
    if left > 0:
        known = f", {len(state.trials)} already started" if state.trials else ""
        console.say(f"tune: {total} trials{known}; {run.tune.search} search, scheduler {run.tune.scheduler}")
        _Sweep(run, run_dir, state, console, lease, follow).run_all()
    winner = state.winner()
    if winner is None:
        raise RunError(f"all trials failed; the first error was: {state.trials[0].error}. See {tune_dir}/state.json")
    write_report(run, tune_dir, state, winner, target, console, render_page)
    return winner


def preflight_trials(run: config.RunConfig) -> None:
    """Runs `preflight` for every model, data set and layer selection in the space. Raises the same errors."""
    assert run.tune is not None  # `check_tune` validates it
    checked: list[Any] = []
    for params in corners(run.tune):
        made = trial_run(run, params, "trial", run.storage)
        method = made.method
        named = (made.model, made.data, method.type, method.target_modules, method.freeze)
        if named not in checked:
            checked.append(named)
            preflight(made)


def winning_run(run: config.RunConfig, run_dir: str, winner: TrialRecord) -> config.RunConfig:
    """The run of the winning trial, for evaluation and export in its directory."""
    return trial_run(run, winner.params, winner.name, tune_directory(run_dir))


@dataclass
class _RunningTrial:
    """A trial that is training; it subscribes to the trial's events.

    Attributes:
        judge: Decides whether the trial continues after an eval. Its workers wait until it returns.
        caught: Contains a signal number once the trial has to stop.
        step: Newest step done.
        ended: The error that ended the trial.
    """

    trial: TrialRecord
    run: config.RunConfig
    judge: Callable[[_RunningTrial, EvalFinished], None]
    caught: list[int] = field(default_factory=list)
    step: int = 0
    ended: FtrayError | None = None
    thread: threading.Thread | None = None

    def subscribe(self, bus: EventBus) -> None:
        """Subscribes its handlers."""
        bus.subscribe(TrainingStarted, lambda event: setattr(self.trial, "num_steps", event.num_steps))
        bus.subscribe(StepFinished, lambda event: setattr(self, "step", event.step + 1))
        bus.subscribe(EvalFinished, lambda event: self.judge(self, event))


class _Sweep:
    """A running sweep. Threads of trials call `_judge_trial`; the lock protects the state."""

    def __init__(
        self,
        run: config.RunConfig,
        run_dir: str,
        state: SweepState,
        console: Console,
        lease: storage.Lease | None,
        follow: Callable[[config.RunConfig], Subscriber] | None,
    ) -> None:
        assert run.tune is not None
        self._run, self._tune, self._run_dir, self._dir = run, run.tune, run_dir, tune_directory(run_dir)
        self._state = state
        self._console, self._lease, self._follow = console, lease, follow
        self._head = ray.get_runtime_context().gcs_address
        self._use_gpu = check_resources(run)
        if "train.precision" in run.tune.space:  # fp16 needs GPUs
            for params in corners(run.tune):
                check_resources(trial_run(run, params, "trial", run.storage))
        self._lock = threading.RLock()
        self._running: list[_RunningTrial] = []
        self._halted: FtrayError | None = None
        self._unsaved = False
        self._judge = TrialPruner(run.tune, state)
        self._total = number_of_trials(run.tune)
        self._data, self._eval_table = self._share_data()

    def run_all(self) -> None:
        """Runs all remaining trials. Raises Interrupted, Preempted or RunHeldError if some could not end."""
        with stop_signals(self._console) as caught, self._console.live_lines() as table:
            while True:
                self._reap()
                if self._lease is not None and self._lease.overtaken and self._halted is None:
                    self._halted = RunHeldError("another process has taken over the sweep; use that one")
                if caught or self._halted is not None:
                    self._stop_all(caught[0] if caught else signal.SIGTERM)
                else:
                    self._fill()
                if not self._running:
                    break
                if self._unsaved:
                    self._save()
                with self._lock:
                    table.update(as_table(self._state, {r.trial.number: r.step for r in self._running}))
                time.sleep(POLL_S)
        self._save()
        self._raise_if_unfinished(caught)

    def _raise_if_unfinished(self, caught: list[int]) -> None:
        left = self._total - sum(trial.status != "running" for trial in self._state.trials)
        if left <= 0:
            return
        if self._halted is not None and not caught:
            raise self._halted
        where = f"{left} of {self._total} trials are not done; {CONTINUE}"
        if caught and is_termination(caught[0]):
            raise Preempted(f"preempted: {where}")
        raise Interrupted(f"interrupted: {where}")

    def _share_data(self) -> tuple[PreparedData | None, Any]:
        """Index, tokens and eval sequences that all trials share. Raises ConfigError, DataError."""
        if not shares_data(self._tune):
            return None, None
        run = self._run
        load = partial(load_tokenizer, absolute_base(run.model))
        tokenizer = load()
        data = prepare_data(run, self._run_dir, self._console, load, tokenizer_hash(tokenizer))
        assert data.eval_index is not None  # `check_tune` validates it
        assert data.eval_stream is not None
        if self._state.data_hash not in ("", data.data_hash):
            hashes = tokenizer_hash(tokenizer), template_hash(tokenizer)
            changed = what_changed(storage.join(self._dir, TrialRecord(0, {}).name), run, data, *hashes)
            raise DataError(
                f"{changed} since the sweep in {self._dir} started; restore it, or start a new sweep: choose another name, "
                "or delete the directory"
            )
        self._state.data_hash = data.data_hash
        self._with_evals(run, data.plan.num_steps)
        most = SHARED_PART * ray.cluster_resources().get("object_store_memory", 0)
        packed = share_sequences(data.plan, most)
        if packed is None:
            self._console.say(
                "tune: the tokens do not fit in the object store, so each trial tokenizes the data itself"
            )
        table = eval_table(data.eval_index, data.eval_stream)
        return replace(data, plan=replace(data.plan, packed=packed)), ray.put(table)

    def _with_evals(self, run: config.RunConfig, num_steps: int) -> config.RunConfig:
        """The run with evals during training. Raises ConfigError if a trial would end before the first."""
        every = run.evaluate.every or max(1, num_steps // NUM_LOSSES)
        if every > num_steps:
            raise ConfigError(
                f"evaluate.every ({every}) is more than the {num_steps} steps of a trial, so a trial would have no eval loss; "
                "lower evaluate.every"
            )
        return run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"every": every})})

    def _fill(self) -> None:
        """Starts trials while resources are free: first unfinished trials, then new ones."""
        while True:
            training = {r.trial.number for r in self._running}
            waiting = [t for t in self._state.trials if t.status == "running" and t.number not in training]
            if (not waiting and len(self._state.trials) >= self._total) or len(self._running) >= self._capacity():
                return
            if not waiting:
                with self._lock:
                    waiting = [TrialRecord(len(self._state.trials), propose(self._tune, self._state.trials))]
                    self._state.trials += waiting
                    self._save()
            self._start(waiting[0])

    def _capacity(self) -> int:
        """Number of trials that can train at once. At least one, which waits for nodes if necessary."""
        capacity = max_workers(self._run.scale, self._use_gpu, usable_nodes()) // self._run.world_sizes[-1]
        return max(1, min(capacity, self._tune.max_concurrent or capacity))

    def _start(self, trial: TrialRecord) -> None:
        try:
            run, data = trial_run(self._run, trial.params, trial.name, self._dir), self._data
            if data is not None:
                plan = plan_sequences(data.index, data.plan.stream, run.train)
                data = replace(data, plan=replace(plan, packed=data.plan.packed))
                trial.num_steps = plan.num_steps
                run = self._with_evals(run, plan.num_steps)
        except FtrayError as err:  # an invalid combination that no corner covers
            self._fail(trial, err)
            return
        known = f" (resuming from the newest checkpoint; evaluated up to step {trial.step})" if trial.reports else ""
        with self._lock:
            self._console.say(f"{trial.name}: {as_words(trial.params)}{known}")
        running = _RunningTrial(trial, run, self._judge_trial, step=trial.step)
        running.thread = threading.Thread(target=self._train, args=(running, data), name=trial.name, daemon=True)
        self._running.append(running)
        running.thread.start()

    def _train(self, running: _RunningTrial, data: PreparedData | None) -> None:
        """Body of a trial's thread."""
        console = _TrialConsole(running.trial.name, self._console, self._lock)
        hooks = TrialHooks(running, running.caught, data, self._eval_table)
        try:
            subscribers = [self._follow(running.run)] if self._follow else []
            with storage.acquire_lease(storage.absolute(running.run.directory), warn=console.warn) as lease:
                train(running.run, open_run(running.run), console, lease, hooks, subscribers)
        except FtrayError as err:
            running.ended = err
        except BaseException as err:  # noqa: BLE001 - otherwise the thread's error is lost
            running.ended = RunError(f"{type(err).__name__}: {' '.join(str(err).split())[:300]}")

    def _judge_trial(self, running: _RunningTrial, event: EvalFinished) -> None:
        trial, step, loss = running.trial, event.step, event.eval_loss
        with self._lock:
            running.step = step
            if trial.report_of(step) is not None:  # repeated after a restart from an earlier checkpoint
                return
            share = step / trial.num_steps
            stop = self._judge.stops(trial.number, share, loss)
            at = sum(len(t.reports) for t in self._state.trials)
            trial.reports.append(EvalReport(at, step, share, loss, stop))
            if stop:
                trial.status = "stopped"
                running.caught.append(signal.SIGINT)
            self._save()
            stopped = f"; stopped after {share:.0%} of its steps" if stop else ""
            self._console.say(f"{trial.name}: eval loss {loss:.4f} at step {step}/{trial.num_steps}{stopped}")

    def _reap(self) -> None:
        """Removes trials that have ended."""
        for running in [r for r in self._running if r.thread is not None and not r.thread.is_alive()]:
            self._running.remove(running)
            trial, err = running.trial, running.ended
            if trial.status == "stopped":
                continue
            if err is None:
                self._end(trial)
            elif isinstance(err, Preempted | RunHeldError):
                self._halted = self._halted or err
            elif isinstance(err, Interrupted):
                continue
            elif is_listening(self._head):
                self._fail(trial, err)
            else:  # all trials resume on a new cluster
                self._halted = self._halted or RunError(f"the Ray cluster's head is gone ({self._head}); {CONTINUE}")

    def _end(self, trial: TrialRecord) -> None:
        with self._lock:
            if trial.best is None:
                trial.status, trial.error = "failed", "the trial ended without an eval loss"
            else:
                trial.status = "done"
            self._save()
            best = f"best eval loss {trial.best.loss:.4f} at step {trial.best.step}" if trial.best else trial.error
            self._console.say(f"{trial.name}: done; {best}")

    def _fail(self, trial: TrialRecord, err: FtrayError) -> None:
        with self._lock:
            trial.status, trial.error = "failed", str(err)
            self._save()
            self._console.warn(f"{trial.name} failed: {err}")

    def _stop_all(self, number: int) -> None:
        for running in self._running:
            if not running.caught:
                running.caught.append(number)

    def _save(self) -> None:
        """Saves the state. If storage does not answer, the next call tries again."""
        if self._lease is not None and self._lease.overtaken:
            return  # the new owner writes it
        with self._lock:
            try:
                save_state(self._state, self._dir)
                self._unsaved = False
            except StorageError as err:
                if not self._unsaved:
                    self._console.warn(f"could not save the sweep's state ({err}); trying again")
                self._unsaved = True


class _TrialConsole(Console):
    """Prefixes a trial's output with its name. Lines go to the log, warnings to the user."""

    def __init__(self, name: str, above: Console, lock: threading.RLock) -> None:
        super().__init__(sys.stdout)
        self._name, self._above, self._lock = name, above, lock

    @property
    def is_terminal(self) -> bool:
        """A trial writes to the log, not to the terminal."""
        return False

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[ProgressLine]:
        """The same as in `Console`, with the trial's name."""
        with super().progress(f"{self._name}: {what}", total, done) as bar:
            yield bar

    def say(self, text: str = "", *, styled: bool = False) -> None:  # noqa: ARG002 - the log has no styles
        """Prints a line to the log."""
        print(printable(redacted(f"{self._name}: {text}")), flush=True)

    def warn(self, text: str) -> None:
        """Prints a warning for the user."""
        with self._lock:
            self._above.warn(f"{self._name}: {text}")
