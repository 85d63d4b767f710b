"""The event log of a run in storage: sessions, worker groups, failures and their causes, alerts.

Each driver writes one file, `<run>/events/<began>-<id>.jsonl`. It is rewritten whole at each event, because an object store
cannot append and these events are few. A store that is down delays no step for it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

from ftray import storage
from ftray.errors import FtrayError, Interrupted, Preempted, RunHeldError, StorageError
from ftray.events.bus import EventBus
from ftray.events.types import (
    AlertRaised,
    Event,
    GroupEnded,
    SessionEnded,
    SessionStarted,
    StepFinished,
    TrainingStarted,
    WeightsRewound,
    from_dict,
    to_dict,
)
from ftray.redact import redacted_tree

MAX_UNIX_S = 2.5e11  # no calendar date beyond it
WRITE_TIMEOUT_S = 5.0


class EventLog:
    """Writes the events of one driver.

    Args:
        run_dir: The run's directory.
        may_write: Whether the run still belongs to this driver; checked before each write.
        now: Unix time in seconds; tests replace it.
    """

    def __init__(self, run_dir: str, may_write: Callable[[], bool], now: Callable[[], float] = time.time) -> None:
        self._may_write, self._now, self._lines = may_write, now, list[str]()
        self._steps_done: int | None = None  # by the current worker group
        self._uri = storage.join(run_dir, "events", f"{int(now() * 1000):013d}-{uuid4().hex[:8]}.jsonl")

    def subscribe(self, bus: EventBus) -> None:
        """Subscribes to the events that are logged."""
        bus.subscribe(TrainingStarted, self._started)
        bus.subscribe(StepFinished, self._step)
        bus.subscribe(WeightsRewound, self.write)
        bus.subscribe(AlertRaised, self.write)

    def _started(self, event: TrainingStarted) -> None:
        self._steps_done = event.step
        self.write(event)

    def _step(self, event: StepFinished) -> None:
        self._steps_done = event.step + 1

    def write(self, event: Event) -> None:
        """Logs an event. If the store is down, the next event writes it too."""
        line = redacted_tree(to_dict(event))
        self._lines.append(json.dumps({"unix_s": round(self._now(), 3), **line}) + "\n")
        if not self._may_write():
            return
        try:
            with storage.brief(WRITE_TIMEOUT_S):
                storage.write_bytes(self._uri, "".join(self._lines).encode())
        except StorageError:
            pass

    @contextmanager
    def session(self, step: int) -> Iterator[None]:
        """Logs start and end of the driver."""
        self.write(SessionStarted(step, socket.gethostname(), os.getpid()))
        try:
            yield
        except BaseException as err:
            self.write(SessionEnded(_how(err), str(err) if isinstance(err, FtrayError) else type(err).__name__))
            raise
        self.write(SessionEnded("finished"))

    def group_ended(self, kind: type[GroupEnded] | None, why: str = "") -> None:
        """Logs why a worker group ended, with its steps. kind: None if it trained to the end."""
        if kind is not None:
            self.write(kind(why, self._steps_done))
        self._steps_done = None


def _how(err: BaseException) -> str:
    kinds = {Interrupted: "interrupted", Preempted: "preempted", RunHeldError: "taken over"}
    return next((word for kind, word in kinds.items() if isinstance(err, kind)), "failed")


@dataclass(frozen=True)
class LoggedEvent:
    """An event of the log. session: Name of its driver's file."""

    session: str
    unix_s: float
    event: Event


def _parse_line(session: str, line: bytes) -> LoggedEvent:
    """Raises ValueError, KeyError or TypeError for a line that `EventLog` did not write."""
    tree = storage.parse_object(line)
    unix_s = float(tree["unix_s"])
    if not math.isfinite(unix_s) or abs(unix_s) > MAX_UNIX_S:
        raise ValueError(f"{unix_s} is not a time")
    return LoggedEvent(session, unix_s, from_dict(tree))


def read_events(run_dir: str, warn: Callable[[str], None] | None = None) -> list[LoggedEvent]:
    """All logged events of a run, oldest first. Skips unreadable lines; `warn` gets a message per damaged file."""
    events = []
    for file in storage.list_files(storage.join(run_dir, "events"), suffix=".jsonl"):
        num_bad = 0
        for line in storage.read_bytes(file.uri).splitlines():
            try:
                events.append(_parse_line(file.path, line))
            except (ValueError, KeyError, TypeError):
                num_bad += 1
        if num_bad and warn is not None:
            warn(f"{file.uri} is damaged: {num_bad} of its lines cannot be read, and their events are left out")
    return sorted(events, key=lambda event: event.unix_s)
