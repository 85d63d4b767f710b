"""Events of a training run as dataclasses, and the one place that turns them into dictionaries and back.

Rank 0 emits the events of training, the driver those of the session and its worker groups. The event log and the JSON
log lines store an event as a dictionary with its `name` under `event`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Base class of all events.

    Attributes:
        name: The event's name in files and log lines.
    """

    name: ClassVar[str]


@dataclass(frozen=True)
class WorkerInfo:
    """The process of one rank."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True)
class WorkersJoined(Event):
    """The processes of a worker group are up; they load the model next."""

    name: ClassVar[str] = "joined"
    workers: tuple[WorkerInfo, ...]


@dataclass(frozen=True)
class TrainingStarted(Event):
    """A worker group has loaded model and checkpoint and starts its first step.

    Attributes:
        step: The first step of this group.
        num_steps: Steps of the whole run.
        workers: World size.
        device: Name of rank 0's GPU, or `CPU`.
    """

    name: ClassVar[str] = "start"
    step: int
    num_steps: int = 0
    workers: int = 1
    device: str = ""


@dataclass(frozen=True)
class MemoryPlanned(Event):
    """The workers chose micro-batch size and gradient checkpointing by the memory that they measured.

    Attributes:
        micro_batch_size: Packed sequences per forward pass.
        layers: Layers with gradient checkpointing.
        num_layers: Layers of the model.
        peak: Expected peak in bytes on each GPU.
    """

    name: ClassVar[str] = "fit"
    micro_batch_size: int
    layers: int
    num_layers: int
    peak: float


@dataclass(frozen=True)
class MicroBatchChanged(Event):
    """The micro-batch size of the checkpoint does not fit these workers."""

    name: ClassVar[str] = "other micro-batch"
    now: int
    before: int


@dataclass(frozen=True)
class StepFinished(Event):
    """Metrics of one optimizer step over all ranks; a line of `metrics.jsonl`.

    Attributes:
        step: The step, from 0.
        loss: Mean over the trained tokens of the global batch, in nats.
        num_tokens: Tokens of the global batch without padding.
        num_trained_tokens: Tokens under the loss.
        sequences: Order-independent hash of the packed sequences of the step, in hex.
        learning_rate: Learning rate of the step.
        grad_norm: Norm of the gradients before clipping; None if DeepSpeed did not compute it.
        tokens_per_s: Tokens per second over all workers, without padding.
        data_wait_s: Seconds that rank 0 waited for data.
        unix_s: Time at the end of the step.
        slowest_rank: Rank with the longest forward passes; None with one worker.
        slowest_by: Its time over the median of the others.
        skipped: Whether the weights were left unchanged because something was not finite.
        loss_scale: fp16's loss scale after the step.
        peak_memory_gib: Peak of allocated memory on rank 0's GPU.
    """

    name: ClassVar[str] = "step"
    step: int
    loss: float
    num_tokens: int
    num_trained_tokens: int
    sequences: str
    learning_rate: float
    grad_norm: float | None
    tokens_per_s: float
    data_wait_s: float
    unix_s: float
    slowest_rank: int | None = None
    slowest_by: float | None = None
    skipped: bool | None = None
    loss_scale: float | None = None
    peak_memory_gib: float | None = None


@dataclass(frozen=True)
class PhaseStarted(Event):
    """The workers load, save or evaluate: no step is due until the next event."""

    name: ClassVar[str] = "busy"
    phase: str


@dataclass(frozen=True)
class EvalFinished(Event):
    """Eval loss after `step` steps, the mean over the trained tokens of the eval set, in nats."""

    name: ClassVar[str] = "eval"
    step: int
    eval_loss: float


@dataclass(frozen=True)
class CheckpointStarted(Event):
    """The state after `step` steps is copied; a background thread commits it."""

    name: ClassVar[str] = "checkpoint"
    step: int


@dataclass(frozen=True)
class WeightsRewound(Event):
    """Before `step`, weights and optimizer were restored from the checkpoint of step `to`."""

    name: ClassVar[str] = "rewind"
    step: int
    to: int = 0


@dataclass(frozen=True)
class TrainingEnded(Event):
    """A worker group leaves after `step` steps. finished: The run is trained to its end."""

    name: ClassVar[str] = "end"
    step: int
    finished: bool


@dataclass(frozen=True)
class AlertRaised(Event):
    """A rule of `alerts` found a problem. kind: The rule's name."""

    name: ClassVar[str] = "alert"
    kind: str
    step: int
    text: str


@dataclass(frozen=True)
class SessionStarted(Event):
    """A driver takes up the run at `step`."""

    name: ClassVar[str] = "began"
    step: int | None = None
    host: str | None = None
    pid: int | None = None


@dataclass(frozen=True)
class SessionEnded(Event):
    """A driver leaves the run.

    Attributes:
        how: finished, interrupted, preempted, taken over or failed.
        why: The error message; "" without an error.
    """

    name: ClassVar[str] = "ended"
    how: str = ""
    why: str = ""


@dataclass(frozen=True)
class GroupEnded(Event):
    """A worker group ended before the end of the run. step: Steps done, if it started."""

    why: str = ""
    step: int | None = None


@dataclass(frozen=True)
class GroupFailed(GroupEnded):
    """A worker died or raised."""

    name: ClassVar[str] = "failed"


@dataclass(frozen=True)
class GroupLeft(GroupEnded):
    """The driver asked the workers to stop."""

    name: ClassVar[str] = "left"


@dataclass(frozen=True)
class GroupNotPlaced(GroupEnded):
    """The cluster had no resources for the workers."""

    name: ClassVar[str] = "no room"


LOGGED: dict[str, type[Event]] = {
    kind.name: kind
    for kind in (
        SessionStarted,
        TrainingStarted,
        WeightsRewound,
        AlertRaised,
        GroupFailed,
        GroupLeft,
        GroupNotPlaced,
        SessionEnded,
    )
}
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "int | None": (int, type(None)), "str": (str,)}
_TYPES["str | None"] = (str, type(None))


def payload(event: Event) -> dict[str, Any]:
    """The fields of an event without those that are None by default."""
    values = {each.name: getattr(event, each.name) for each in fields(event)}
    return {
        each.name: values[each.name]
        for each in fields(event)
        if values[each.name] is not None or each.default is MISSING
    }


def to_dict(event: Event) -> dict[str, Any]:
    """`payload` with the event's name under `event`."""
    return {"event": event.name, **payload(event)}


def from_dict(tree: Mapping[str, Any]) -> Event:
    """The event of a line of the event log. Unknown keys are ignored.

    Raises:
        ValueError: The event is unknown, lacks a field, or a field has another type.
    """
    kind = LOGGED.get(str(tree.get("event")))
    if kind is None:
        raise ValueError(f"unknown event {tree.get('event')!r}")
    values = {}
    for each in fields(kind):
        if each.name not in tree:
            if each.default is MISSING:
                raise ValueError(f"{kind.name} lacks {each.name}")
            continue
        value = tree[each.name]
        if not isinstance(value, _TYPES[str(each.type)]) or isinstance(value, bool):
            raise ValueError(f"{each.name} ({value!r}) is not of type {each.type}")
        values[each.name] = value
    return kind(**values)
