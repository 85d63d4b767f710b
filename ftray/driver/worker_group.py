"""One worker group from start to end: Ray Train runs it on a thread, this thread watches it.

`supervisor` decides why a group should stop, and what follows its end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig, TorchTrainer

from ftray import errors
from ftray.compat.ray_train import TorchBackend
from ftray.errors import FtrayError, RunError
from ftray.events.types import (
    CheckpointStarted,
    EvalFinished,
    Event,
    GroupEnded,
    GroupFailed,
    GroupLeft,
    GroupNotPlaced,
    StepFinished,
    TrainingEnded,
    WorkerInfo,
    WorkersJoined,
)
from ftray.network import use_interface_to
from ftray.train.driver_channel import WorkerLocation
from ftray.train.failures import explain, was_not_placed

POLL_S = 0.3
OTHER_PHASES_S = 3600.0  # limit without an event while loading, compiling, saving or evaluating
KILL_S = 120.0  # after which a killed group counts as gone, whatever Ray Train says
OVERTAKEN = "another process took over the run"  # stop reason: the workers may not write any more
LEAVE_AT_ONCE = "a stop was requested"  # stop reason: after the current step, or at once before the first one
STEP_IS_NEXT = (StepFinished, EvalFinished, CheckpointStarted)  # after other events the workers do something else


class GlooBackend(TorchConfig):
    """Ray Train's torch backend, with gloo on the network through which rank 0 is reached."""

    @property
    def backend_cls(self) -> Any:
        """The class that Ray Train starts a group with."""
        return _GlooBackendImpl


class _GlooBackendImpl(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Chooses the network on each worker, and starts torch.distributed."""
        try:
            first = worker_group.execute_single(0, ray.util.get_node_ip_address)
            worker_group.execute(use_interface_to, first)
            super().on_start(worker_group, backend_config)
        except Exception:
            # Ray Train would keep the placement group until the driver ends, and the next group could not be placed.
            worker_group.get_worker_group_state().shutdown()
            raise


@dataclass(frozen=True)
class GroupResult:
    """How a worker group ended.

    Attributes:
        finished: It trained to the end.
        stop_reason: Why it was asked to stop; "" if it was not.
        error: What a retry will not fix.
        failure: Any other failure, as a message.
        not_placed: It never started, because the cluster lacked resources.
    """

    finished: bool
    stop_reason: str = ""
    error: FtrayError | None = None
    failure: str = ""
    not_placed: bool = False

    @property
    def event_type(self) -> type[GroupEnded] | None:
        """The event that the log keeps of this end; None if the group trained to the end."""
        if self.finished:
            return None
        if self.not_placed:
            return GroupNotPlaced
        return GroupFailed if self.failure or self.error else GroupLeft

    @property
    def why(self) -> str:
        """Why it ended early."""
        return self.failure or self.stop_reason or (str(self.error) if self.error else "")


class HangDetector:
    """Detects a group that has been silent for too long.

    Args:
        hang_timeout_s: Limit for a step.
        now: Monotonic time in seconds; tests replace it.
    """

    def __init__(self, hang_timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._now = hang_timeout_s, now
        self._last_s, self._step_is_next = now(), False

    def note(self, event: Event) -> None:
        """Restarts the clock. A group's first step is not timed: it compiles kernels."""
        self._last_s = self._now()
        self._step_is_next = isinstance(event, STEP_IS_NEXT)

    @property
    def problem(self) -> str:
        """What is wrong, as a message; "" while nothing is."""
        silent_s = self._now() - self._last_s
        if self._step_is_next and silent_s > self._limit_s:
            return f"no step for {silent_s:.0f} s (train.hang_timeout_s: {self._limit_s:g})"
        if silent_s > max(OTHER_PHASES_S, self._limit_s):
            return f"no event for {silent_s:.0f} s while loading, saving or evaluating"
        return ""


def run_group(
    trainer: TorchTrainer,
    channel: Any,
    hang_detector: HangDetector,
    emit: Callable[[Event], None],
    stop_reason: Callable[[list[WorkerLocation]], str],
) -> GroupResult:
    """Starts a worker group and watches it to its end.

    A group that hangs is killed, and so is one that may not write any more or has nothing to commit.

    Args:
        trainer: Ray Train's trainer.
        channel: Handle of the group's DriverChannel.
        hang_detector: Watches the group's events.
        emit: Gets each event of rank 0.
        stop_reason: Polled with the workers: why the group should commit a checkpoint and stop; "" if it should not.
    """
    return _GroupWatch(trainer, channel, hang_detector, emit, stop_reason).watch()


class _GroupWatch:
    def __init__(
        self,
        trainer: TorchTrainer,
        channel: Any,
        hang_detector: HangDetector,
        emit: Callable[[Event], None],
        stop_reason: Callable[[list[WorkerLocation]], str],
    ) -> None:
        self._trainer, self._channel, self._hang_detector = trainer, channel, hang_detector
        self._emit, self._stop_reason = emit, stop_reason
        self._error: BaseException | None = None
        self._finished, self._joined, self._stepped = False, False, False
        self._stopping = ""

    def watch(self) -> GroupResult:
        """Polls until Ray Train returns, or a killed group has had its time."""
        thread = threading.Thread(target=self._fit, daemon=True)
        thread.start()
        hang, killed_s = "", 0.0
        while thread.is_alive() and not (hang and time.monotonic() - killed_s > KILL_S):
            thread.join(POLL_S)
            evaluated = self._drain()
            if self._stop_if_asked():
                return GroupResult(False, self._stopping)
            if evaluated is not None:
                self._channel.settle.remote(evaluated, bool(self._stopping))
            if not hang and thread.is_alive() and (hang := self._hang_detector.problem):
                killed_s = time.monotonic()
                self._kill()
        return self._result(hang)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as err:  # noqa: BLE001 - handed to the main thread, which waits for this one
            self._error = err

    def _drain(self) -> int | None:
        """Emits the events since the last call; the step of an eval among them."""
        evaluated = None
        for event in ray.get(self._channel.drain.remote()):
            self._hang_detector.note(event)
            self._emit(event)
            self._finished = self._finished or (isinstance(event, TrainingEnded) and event.finished)
            self._stepped = self._stepped or isinstance(event, StepFinished)
            evaluated = event.step if isinstance(event, EvalFinished) else evaluated
        return evaluated

    def _stop_if_asked(self) -> bool:
        """Asks the workers to stop where there is a reason; True if they were killed."""
        workers = ray.get(self._channel.workers.remote())
        if workers and not self._joined:
            self._joined = True
            self._emit(WorkersJoined(tuple(WorkerInfo(each.rank, each.host, each.pid) for each in workers)))
        if self._stopping or not (reason := self._stop_reason(workers)):
            return False
        self._stopping = reason
        self._channel.stop.remote()
        is_killed = reason == OVERTAKEN or (reason == LEAVE_AT_ONCE and not self._stepped)
        if is_killed:
            self._kill()
        return is_killed

    def _kill(self) -> None:
        """SIGKILL for every worker: one that is stopped, or stuck in a collective, reacts to nothing else."""
        for worker in ray.get(self._channel.workers.remote()):
            ray.kill(worker.actor)

    def _result(self, hang: str) -> GroupResult:
        if (permanent := ray.get(self._channel.failure.remote())) is not None:
            kind, message = permanent
            return GroupResult(False, self._stopping, error=getattr(errors, kind, RunError)(message))
        failure = ""
        if hang:
            failure = f"{hang}; its workers were killed"
        elif self._error is not None:
            failure = explain(self._error)
        elif not (self._finished or self._stopping):
            failure = "the workers stopped before the last step"
        return GroupResult(self._finished and not failure, self._stopping, None, failure, was_not_placed(self._error))
