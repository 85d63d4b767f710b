"""The interface of a tracker, and what all of them need."""

from __future__ import annotations

import re
import uuid
from typing import Any, Protocol

from ftray import storage

Segment = list[dict[str, Any]]  # the lines of metrics that one checkpoint committed


class Tracker(Protocol):
    """An experiment tracker. Its methods may raise anything."""

    def update(self, segments: list[Segment]) -> None:
        """Brings the tracker up to the committed timeline, all of which is passed each time."""

    def close(self, state: str) -> None:
        """The command has ended as FINISHED, KILLED (to be continued) or FAILED."""

    def abandon(self) -> None:
        """Called by another thread when there is no more time: nothing may outlive the command."""


def metric_values(line: dict[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics, by name; without those that were not finite."""
    return {
        key: float(value)
        for key, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in ("step", "unix_s")
    }


def tracker_id(run_dir: str) -> str:
    """The run's id for trackers, wherever it is continued; a run that is deleted and started again gets another.

    A damaged id is replaced: trackers then show a second run.
    """
    uri = storage.join(run_dir, "trackers", "id")
    if not storage.exists(uri):
        storage.create_bytes(uri, uuid.uuid4().hex[:16].encode())
    name = storage.read_bytes(uri).decode(errors="replace")
    if not re.fullmatch(r"[0-9a-f]{16}", name):
        name = uuid.uuid4().hex[:16]
        storage.write_bytes(uri, name.encode())
    return name
