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
        self._failure: tuple[str, str] | None = None

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

    def fail(self, kind: str, message: str) -> None:
        """Keeps the first error that trying again won't cure: kind is its class's name in `errors`."""
        self._failure = self._failure or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        """What `fail` kept."""
        return self._failure

    def stop(self) -> None:
        """Asks the workers to commit a checkpoint and leave at the next step."""
        self._stop = True
