"""Events for tests."""

from __future__ import annotations

from typing import Any

from ftray.events.bus import EventBus
from ftray.events.types import Event, StepFinished


def step_finished(step: int, **values: Any) -> StepFinished:
    """Metrics of a step that nothing is wrong with."""
    defaults = {
        "loss": 1.5,
        "num_tokens": 1000,
        "num_trained_tokens": 500,
        "sequences": "0",
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens_per_s": 1000.0,
        "data_wait_s": 0.01,
        "unix_s": 0.0,
    }
    return StepFinished(step, **{**defaults, **values})


class Recorder:
    """Keeps all events of a run in a list."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def subscribe(self, bus: EventBus) -> None:
        """Subscribes to all events."""
        bus.subscribe(Event, self._events.append)
