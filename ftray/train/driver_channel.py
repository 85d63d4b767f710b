"""What driver and workers exchange: the job, the workers' locations, events, stop requests."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import ray

from ftray import config, storage
from ftray.events.types import Event


@dataclass(frozen=True)
class TrainJob:
    """The training job that the driver sends to each worker.

    Attributes:
        run: The run's configuration.
        run_dir: The run's directory, absolute.
        meta: Hashes and versions, kept in each checkpoint.
        eval_table: Reference to the table of eval sequences, or None.
        channel: Handle of the DriverChannel actor.
        parent: The checkpoint whose weights a new run starts from, or None.
        lease: The driver's right to write the run.
        waits: Whether to pause after each eval for the driver's stop/continue decision.
    """

    run: config.RunConfig
    run_dir: str
    meta: dict[str, Any]
    eval_table: Any
    channel: Any
    parent: str | None = None
    lease: storage.Token | None = None
    waits: bool = False


@dataclass(frozen=True)
class WorkerLocation:
    """Where a rank runs. actor: Handle to kill it."""

    rank: int
    node_id: str
    host: str
    pid: int
    actor: Any


class DriverChannel:
    """An actor between the driver and one worker group: rank 0 records events, the driver drains them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._last_settled = -1
        self._stop = False
        self._failure: tuple[str, str] | None = None
        self._workers: list[WorkerLocation] = []

    def join(self, worker: WorkerLocation) -> None:
        """A worker has started."""
        self._workers.append(worker)

    def workers(self) -> list[WorkerLocation]:
        """The workers that have started, by rank."""
        return sorted(self._workers, key=lambda worker: worker.rank)

    def record(self, event: Event) -> bool:
        """Keeps an event for the driver; returns whether the workers should stop."""
        with self._lock:
            self._events.append(event)
            return self._stop

    def drain(self) -> list[Event]:
        """Events since the last call, oldest first."""
        with self._lock:
            events, self._events = self._events, []
            return events

    def fail(self, kind: str, message: str) -> None:
        """Keeps the first error that a retry will not fix. kind: Name of its class in `errors`."""
        self._failure = self._failure or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        """The (kind, message) of `fail`."""
        return self._failure

    def settle(self, step: int, stop: bool) -> None:
        """Records the driver's stop/continue decision after the eval of a step."""
        with self._settled:
            self._last_settled, self._stop = step, self._stop or stop
            self._settled.notify_all()

    def verdict(self, step: int) -> bool:
        """Waits until a step is settled; returns whether the workers should stop."""
        with self._settled:
            self._settled.wait_for(lambda: self._last_settled >= step)
            return self._stop

    def stop(self) -> None:
        """Asks the workers to commit a checkpoint and stop at the next step."""
        self._stop = True


class DriverLink:
    """A rank's channel to the driver: events go out, a stop request comes back with the reply to the one before.

    Args:
        channel: Handle of the DriverChannel actor on rank 0; None on other ranks, whose events are dropped.
    """

    def __init__(self, channel: Any | None) -> None:
        self._channel, self._reply, self._stop = channel, None, False

    def send(self, event: Event, last: bool = False) -> None:
        """Sends an event without waiting, unless it is the last."""
        if self._channel is None:
            return
        self._reply = self._channel.record.remote(event)
        if last:
            ray.get(self._reply)

    def await_verdict(self, step: int) -> None:
        """Waits for the driver's stop/continue decision after the eval of a step."""
        if self._channel is not None:
            self._stop = ray.get(self._channel.verdict.remote(step)) or self._stop

    def stop_requested(self) -> bool:
        """Whether the driver requested a stop, as far as its replies have arrived."""
        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._reply))
        return self._stop
