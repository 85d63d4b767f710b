"""What happened to a run while it trained, in storage: starts, failures and their causes, alarms, the end.

One file a driver, `<run>/events/<began>-<id>.jsonl`, written whole at each event (an object store can't append, and events
are few). It is told, never asked: nothing that a run does depends on it, and a store that is down loses no step for it.
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
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ftray import storage
from ftray.errors import FtrayError, Interrupted, Preempted, RunHeldError, StorageError
from ftray.redact import redacted_tree

LAST_S = 2.5e11  # beyond it no date can be written
WRITE_S = 5.0  # that a store which is down may hold a driver up
KEPT = {"start": ("step", "num_steps", "workers", "device"), "rewind": ("step", "to")}  # of what rank 0 tells

if TYPE_CHECKING:
    from ftray.driver.worker_group import GroupResult


class EventLog:
    """One driver's events. may_write: asked before each write, whether the run is still this driver's. now: for tests."""

    def __init__(self, run_dir: str, may_write: Callable[[], bool], now: Callable[[], float] = time.time) -> None:
        self._may_write, self._now, self._lines = may_write, now, list[str]()
        self._done: int | None = None  # steps, of the group that is at work
        self._uri = storage.join(run_dir, "events", f"{int(now() * 1000):013d}-{uuid4().hex[:8]}.jsonl")

    def tell(self, event: str, **what: Any) -> None:
        """Keeps an event."""
        self._lines.append(json.dumps({"unix_s": round(self._now(), 3), "event": event, **redacted_tree(what)}) + "\n")
        if not self._may_write():
            return
        try:
            with storage.brief(WRITE_S):
                storage.write_bytes(self._uri, "".join(self._lines).encode())
        except StorageError:
            pass  # written with the next one

    def heard(self, event: dict[str, Any]) -> None:
        """Keeps what matters of an event of rank 0."""
        if event["event"] in ("start", "step"):
            self._done = event["step"] + (event["event"] == "step")
        if (kept := KEPT.get(event["event"])) is not None:
            self.tell(event["event"], **{name: event[name] for name in kept if name in event})

    @contextmanager
    def session(self, step: int) -> Iterator[None]:
        """Keeps that a driver began, and how it ended."""
        self.tell("began", step=step, host=socket.gethostname(), pid=os.getpid())
        try:
            yield
        except BaseException as err:
            self.tell("ended", how=_how(err), why=str(err) if isinstance(err, FtrayError) else type(err).__name__)
            raise
        self.tell("ended", how="finished", why="")

    def group_ended(self, ended: GroupResult) -> None:
        """Keeps how a group of workers ended and after how many steps, unless it trained to the end."""
        why = ended.failure or ended.wish or (str(ended.error) if ended.error else "")
        if not ended.finished:
            done = {} if self._done is None else {"step": self._done}
            self.tell(
                "no room" if ended.no_room else "failed" if ended.failure or ended.error else "left", why=why, **done
            )
        self._done = None


def _how(err: BaseException) -> str:
    kinds = {Interrupted: "interrupted", Preempted: "preempted", RunHeldError: "taken over"}
    return next((word for kind, word in kinds.items() if isinstance(err, kind)), "failed")


@dataclass(frozen=True)
class LoggedEvent:
    """One event. session: name of its driver's file."""

    session: str
    unix_s: float
    event: str
    what: dict[str, Any]


def _parse_event(session: str, tree: dict[str, Any]) -> LoggedEvent:
    """Raises ValueError, KeyError, TypeError for what no `Journal` wrote."""
    unix_s, event = float(tree.pop("unix_s")), str(tree.pop("event"))
    if not math.isfinite(unix_s) or abs(unix_s) > LAST_S:
        raise ValueError(f"{unix_s} is no time")
    for key in ("step", "workers", "to"):
        if tree.get(key) is not None and (isinstance(tree[key], bool) or not isinstance(tree[key], int)):
            raise ValueError(f"{key} is not a number")
    return LoggedEvent(session, unix_s, event, tree)


def read_events(run_dir: str, warn: Callable[[str], None] | None = None) -> list[LoggedEvent]:
    """All events of a run, oldest first. A line that can't be read is passed over; warn: told of its file."""
    found = []
    for file in storage.list_files(storage.join(run_dir, "events"), suffix=".jsonl"):
        num_bad = 0
        for line in storage.read_bytes(file.uri).splitlines():
            try:
                found.append(_parse_event(file.path, storage.parse_object(line)))
            except (ValueError, KeyError, TypeError):
                num_bad += 1
        if num_bad and warn is not None:
            warn(f"{file.uri} is damaged: {num_bad} of its lines can't be read, and these events are left out")
    return sorted(found, key=lambda event: event.unix_s)
