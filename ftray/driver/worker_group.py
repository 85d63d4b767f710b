"""One group of workers, from start to end: Ray Train's fit on a thread of its own, watched from this one.

Does not know why a group should leave (`wish`), nor what follows its end (`supervise`).
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
from ftray.compat.ray import TorchBackend
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
from ftray.train.failures import explain, had_no_room

POLL_S = 0.3
OTHER_PHASES_S = 3600.0  # without an event while loading, compiling, saving or evaluating: then they hang, too
KILL_S = 120.0  # after which a group that was killed counts as gone whatever Ray Train says
OVERTAKEN = "the run was taken over"  # wishes: its workers may write no more
LEAVE_AT_ONCE = "asked to stop"  # after the step under way, and before the first one without any
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
            # Ray Train would keep the placement group until the driver ends, and the next group would not be placed.
            worker_group.get_worker_group_state().shutdown()
            raise


@dataclass(frozen=True)
class GroupResult:
    """How a group ended. finished: trained to the end. wish: why it was asked to leave, "" if it was not.

    error: what trying again won't cure. failure: any other one, in words. no_room: it never started, for want of room.
    """

    finished: bool
    wish: str = ""
    error: FtrayError | None = None
    failure: str = ""
    no_room: bool = False

    @property
    def event_type(self) -> type[GroupEnded] | None:
        """The event that the log keeps of this end; None if the group trained to the end."""
        if self.finished:
            return None
        if self.no_room:
            return GroupNotPlaced
        return GroupFailed if self.failure or self.error else GroupLeft

    @property
    def why(self) -> str:
        """Why it ended early."""
        return self.failure or self.wish or (str(self.error) if self.error else "")


class HangDetector:
    """Seconds since a group gave a sign, and whether that is too long. now: for tests."""

    def __init__(self, hang_timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._now = hang_timeout_s, now
        self._last_s, self._counts = now(), False

    def note(self, event: Event) -> None:
        """Restarts the clock. A group's first step is not timed: it compiles kernels."""
        self._last_s = self._now()
        self._counts = isinstance(event, STEP_IS_NEXT)

    @property
    def hangs(self) -> str:
        """What is wrong, in words; "" while nothing is."""
        silent_s = self._now() - self._last_s
        if self._counts and silent_s > self._limit_s:
            return f"no step for {silent_s:.0f} s (train.hang_timeout_s: {self._limit_s:g})"
        if silent_s > max(OTHER_PHASES_S, self._limit_s):
            return f"loading, saving or evaluating gave no sign for {silent_s:.0f} s"
        return ""


def run_group(
    trainer: TorchTrainer,
    monitor: Any,
    clock: HangDetector,
    emit: Callable[[Event], None],
    wish: Callable[[list[WorkerLocation]], str],
) -> GroupResult:
    """Starts a group and watches it to its end. emit: gets each event of rank 0.

    wish: asked again and again, with where the workers run, why the group should commit a checkpoint and leave ("":
    it should not). A group that hangs is killed, and so is one that may not write any more, or has nothing to commit.
    """
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as err:  # noqa: BLE001 - handed to the main thread, which waits for this one
            raised.append(err)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    finished, joined, stepped, asked, hangs, killed_s = False, False, False, "", "", 0.0
    while thread.is_alive() and not (hangs and time.monotonic() - killed_s > KILL_S):
        thread.join(POLL_S)
        evaluated = None
        for event in ray.get(monitor.drain.remote()):
            clock.note(event)
            emit(event)
            finished = finished or (isinstance(event, TrainingEnded) and event.finished)
            stepped = stepped or isinstance(event, StepFinished)
            evaluated = event.step if isinstance(event, EvalFinished) else evaluated
        places = ray.get(monitor.places.remote())
        if places and not joined:
            joined = True
            emit(WorkersJoined(tuple(WorkerInfo(each.rank, each.host, each.pid) for each in places)))
        if not asked and (asked := wish(places)):
            monitor.stop.remote()
            if asked == OVERTAKEN or (asked == LEAVE_AT_ONCE and not stepped):
                _kill(monitor)
                return GroupResult(False, asked)
        if evaluated is not None:
            monitor.settle.remote(evaluated, bool(asked))
        if not hangs and thread.is_alive() and (hangs := clock.hangs):
            killed_s = time.monotonic()
            _kill(monitor)
    if (known := ray.get(monitor.failure.remote())) is not None:
        kind, message = known
        return GroupResult(False, asked, error=getattr(errors, kind, RunError)(message))
    error = raised[0] if raised else None
    failure = f"{hangs}; its workers were killed" if hangs else explain(error) if error is not None else ""
    if not (failure or finished or asked):
        failure = "the workers left before the last step"
    return GroupResult(finished and not failure, asked, None, failure, had_no_room(error))


def _kill(monitor: Any) -> None:
    """SIGKILL for every worker: one that is stopped or stuck in a collective hears nothing else."""
    for place in ray.get(monitor.places.remote()):
        ray.kill(place.actor)
