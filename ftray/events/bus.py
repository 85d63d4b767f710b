"""What becomes of the events of rank 0: shown, kept in the journal, watched for alarms, told to those who follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.console import Console
from ftray.events.alerts import Alert, AlertMonitor
from ftray.events.event_log import EventLog

Tell = Callable[[dict[str, Any]], None]  # who is told each event of rank 0


@dataclass(frozen=True)
class EventBus:
    """All who hear the events of a run. on_checkpoint: called when one was committed; told: each event, and alarms."""

    console: Console
    bar: Any
    journal: EventLog
    watch: AlertMonitor
    on_checkpoint: Callable[[], None]
    told: Sequence[Tell]

    def heard(self, event: dict[str, Any]) -> None:
        """Takes one event, in this order: shown, kept, judged, told."""
        self._log(event)
        _show(event, self.bar, self.console)
        self.journal.heard(event)
        if event["event"] == "checkpoint":
            self.on_checkpoint()
        for alarm in _alarms(self.watch, event, self.console):
            self.console.warn(f"step {alarm.step}: {alarm.text}")
            self.journal.tell("alarm", kind=alarm.kind, step=alarm.step, text=alarm.text)
            self._tell({"event": "alarm", "kind": alarm.kind})
        self._tell(event)

    def _tell(self, event: dict[str, Any]) -> None:
        for tell in self.told:
            tell(event)

    def _log(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self.console.step = event["step"]
        for worker in event.get("places", ()):
            self.console.event("worker", f"worker {worker['rank']} is up on {worker['host']}", **worker)
        if event["event"] not in ("busy", "joined"):
            what = {key: value for key, value in event.items() if key not in ("event", "step")}
            self.console.event(event["event"], rank=0, **what)


def _alarms(watch: AlertMonitor, event: dict[str, Any], console: Console) -> list[Alert]:
    """What the watch says; it never ends a run."""
    try:
        return list(watch.heard(event))
    except (ArithmeticError, LookupError, TypeError, ValueError) as err:
        console.warn(
            f"an alarm could not be decided ({type(err).__name__}: {err}); this is a fault of ftray, report it"
        )
        return []


def _show(event: dict[str, Any], bar: Any, console: Console) -> None:
    if event["event"] == "step":
        skipped = " · skipped (not finite)" if event.get("skipped") else ""
        bar.update(event["step"] + 1, f"loss {event['loss']:.4f} · {event['tokens_per_s']:.0f} tokens/s{skipped}")
    elif event["event"] == "heldout":
        console.say(f"held-out loss at step {event['step']}: {event['heldout_loss']:.4f}")
    elif event["event"] == "rewind":
        console.warn(
            f"weights and optimizer are those of step {event['to']} again; training goes on at step {event['step']}"
        )
    elif event["event"] == "joined":
        console.say("train: workers are up and load the model")
    elif event["event"] == "fit":
        console.say(
            f"train: micro-batch {event['micro_batch_size']}, {event['layers']} of {event['num_layers']} layers recomputed; "
            f"{event['peak'] / 2**30:.0f} GiB expected on each GPU"
        )
    elif event["event"] == "other micro-batch":
        console.warn(
            f"the micro-batch of {event['before']} rows that this run was begun with doesn't fit these workers; it is "
            f"{event['now']} from here on: dropout falls on other places than it would have, all else stays the same"
        )
    elif event["event"] == "start" and event["step"] > 0:
        console.say(f"train: workers continue at step {event['step']}")
