"""Delivers the events of a run to its subscribers, by type and in order of subscription."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ftray.console import Console, ProgressLine
from ftray.events.types import (
    AlertRaised,
    CheckpointStarted,
    EvalFinished,
    Event,
    MemoryPlanned,
    MicroBatchChanged,
    StepFinished,
    TrainingEnded,
    TrainingStarted,
    WeightsRewound,
    WorkersJoined,
    payload,
)

E = TypeVar("E", bound=Event)


class EventBus:
    """Calls the handlers of an event's type. An error of a handler reaches the emitter."""

    def __init__(self) -> None:
        self._handlers: list[tuple[type[Event], Callable[[Any], None]]] = []

    def subscribe(self, kind: type[E], handler: Callable[[E], None]) -> None:
        """Calls `handler` with each event of type `kind`; `Event` subscribes to all."""
        self._handlers.append((kind, handler))

    def emit(self, event: Event) -> None:
        """Calls each handler of the event's type. A handler may emit further events."""
        for kind, handler in self._handlers:
            if isinstance(event, kind):
                handler(event)


class Subscriber(Protocol):
    """Follows a run through its events."""

    def subscribe(self, bus: EventBus) -> None:
        """Subscribes its handlers."""


class ConsoleSubscriber:
    """Shows events: the progress line, messages, and a JSON object per event where the console prints JSON."""

    def __init__(self, console: Console, bar: ProgressLine) -> None:
        self._console, self._bar = console, bar

    def subscribe(self, bus: EventBus) -> None:
        """Subscribes its handlers."""
        bus.subscribe(WorkersJoined, self._joined)
        bus.subscribe(StepFinished, self._at_step)
        for kind in (
            TrainingStarted,
            MemoryPlanned,
            MicroBatchChanged,
            StepFinished,
            EvalFinished,
            CheckpointStarted,
            WeightsRewound,
            TrainingEnded,
        ):
            bus.subscribe(kind, self._log)
        bus.subscribe(StepFinished, self._step)
        bus.subscribe(EvalFinished, self._eval)
        bus.subscribe(WeightsRewound, self._rewound)
        bus.subscribe(MemoryPlanned, self._memory)
        bus.subscribe(MicroBatchChanged, self._micro_batch)
        bus.subscribe(TrainingStarted, self._started)
        bus.subscribe(AlertRaised, self._alert)

    def _log(self, event: Event) -> None:
        values = {key: value for key, value in payload(event).items() if key != "step"}
        self._console.event(event.name, rank=0, **values)

    def _at_step(self, event: StepFinished) -> None:
        self._console.step = event.step

    def _joined(self, event: WorkersJoined) -> None:
        for each in event.workers:
            text = f"worker {each.rank} is up on {each.host}"
            self._console.event("worker", text, rank=each.rank, host=each.host, pid=each.pid)
        self._console.say("train: workers are up and load the model")

    def _step(self, event: StepFinished) -> None:
        skipped = " · skipped (not finite)" if event.skipped else ""
        self._bar.update(event.step + 1, f"loss {event.loss:.4f} · {event.tokens_per_s:.0f} tokens/s{skipped}")

    def _eval(self, event: EvalFinished) -> None:
        self._console.say(f"eval loss at step {event.step}: {event.eval_loss:.4f}")

    def _rewound(self, event: WeightsRewound) -> None:
        self._console.warn(
            f"weights and optimizer are restored from step {event.to}; training continues at step {event.step}"
        )

    def _memory(self, event: MemoryPlanned) -> None:
        self._console.say(
            f"train: micro-batch {event.micro_batch_size}, gradient checkpointing in {event.layers} of {event.num_layers} "
            f"layers; {event.peak / 2**30:.0f} GiB expected on each GPU"
        )

    def _micro_batch(self, event: MicroBatchChanged) -> None:
        self._console.warn(
            f"the run started with a micro-batch of {event.before} packed sequences, which does not fit these workers; it "
            f"continues with {event.now}. Dropout masks change, everything else stays the same"
        )

    def _started(self, event: TrainingStarted) -> None:
        if event.step > 0:
            self._console.say(f"train: workers continue at step {event.step}")

    def _alert(self, event: AlertRaised) -> None:
        self._console.warn(f"step {event.step}: {event.text}")
