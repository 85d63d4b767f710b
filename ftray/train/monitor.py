"""The line between driver and workers: an actor that keeps events for the driver, and the driver's wish to stop."""

from __future__ import annotations

import threading
from typing import Any


class Monitor:
    """An actor. Rank 0 records events; the driver drains them."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._stop = False

    def record(self, event: dict[str, Any]) -> bool:
        """Keeps an event for the driver; returns whether it wants the run to stop."""
        with self._lock:
            self._events.append(event)
            return self._stop

    def drain(self) -> list[dict[str, Any]]:
        """Events since the last call, oldest first."""
        with self._lock:
            events, self._events = self._events, []
            return events

    def stop(self) -> None:
        """Asks the workers to commit a checkpoint and leave at the next step."""
        self._stop = True
