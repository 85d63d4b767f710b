"""Events: each goes to the handlers of its type, in order; those of the log come back from their dictionary."""

from __future__ import annotations

from typing import Any

import pytest

from ftray.events import types
from ftray.events.bus import EventBus
from ftray.events.types import (
    AlertRaised,
    CheckpointStarted,
    Event,
    GroupFailed,
    GroupLeft,
    SessionEnded,
    SessionStarted,
    TrainingStarted,
    WeightsRewound,
    from_dict,
    to_dict,
)
from tests.events import step_finished


def test_events_reach_the_handlers_of_their_type_in_order_of_subscription() -> None:
    bus, calls = EventBus(), list[tuple[str, str]]()
    bus.subscribe(CheckpointStarted, lambda event: calls.append(("first", event.name)))
    bus.subscribe(Event, lambda event: calls.append(("all", event.name)))
    bus.subscribe(CheckpointStarted, lambda event: calls.append(("last", event.name)))
    bus.emit(CheckpointStarted(3))
    bus.emit(WeightsRewound(3, 1))
    assert calls == [("first", "checkpoint"), ("all", "checkpoint"), ("last", "checkpoint"), ("all", "rewind")]


LOGGED = [
    SessionStarted(3, "host", 7),
    TrainingStarted(3, 9, 2, "CPU"),
    WeightsRewound(4, 2),
    AlertRaised("spike", 5, "the loss jumped"),
    GroupFailed("a worker died", 5),
    GroupLeft("a stop was requested"),
    SessionEnded("finished"),
]


@pytest.mark.parametrize("event", LOGGED, ids=lambda event: event.name)
def test_logged_events_come_back_from_their_dictionary(event: Event) -> None:
    assert from_dict(to_dict(event)) == event
    assert from_dict({**to_dict(event), "unix_s": 1.0, "of a newer version": True}) == event


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"event": "step", "step": 1}, "unknown event 'step'"),
        ({}, "unknown event None"),
        ({"event": "start"}, "start lacks step"),
        ({"event": "start", "step": True}, r"step \(True\) is not of type int"),
        ({"event": "start", "step": "1"}, r"step \('1'\) is not of type int"),
        ({"event": "alert", "kind": 1, "step": 1, "text": ""}, r"kind \(1\) is not of type str"),
    ],
)
def test_a_dictionary_that_the_log_did_not_write_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(tree)


def test_metrics_that_do_not_apply_are_left_out_but_a_missing_norm_is_null() -> None:
    tree = to_dict(step_finished(3, grad_norm=None))
    assert tree["event"] == "step"
    assert tree["grad_norm"] is None
    assert {"skipped", "loss_scale", "slowest_rank", "peak_memory_gib"}.isdisjoint(tree)


def test_no_two_events_share_a_name() -> None:
    kinds = [kind for kind in vars(types).values() if isinstance(kind, type) and issubclass(kind, Event)]
    names = [kind.name for kind in kinds if hasattr(kind, "name")]
    assert len(names) == len(set(names)) > 12
