"""Alerts: problems of a run, each with a remedy. The rules are pure functions of the metrics; no Ray, no torch.

A rule reads the metrics so far and returns a message or None. `AlertMonitor` applies the rules after each step and raises
each kind once. Rules compare medians over windows, so that they stay silent on a healthy run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from ftray import config
from ftray.events.bus import EventBus
from ftray.events.types import AlertRaised, EvalFinished, StepFinished, TrainingStarted, payload

Line = Mapping[str, Any]
FIRST = 5  # steps; their median is the initial loss
WINDOW = 32  # steps before the current one that define the usual loss
SETTLE_STEPS = 5  # steps after a spike that distinguish it from a lasting rise
SPIKE, SIGMAS = 1.5, 8.0  # a spike: times the usual loss, and standard deviations above it
RISE = 1.1  # a rise: times the initial loss, or 1.5 × RISE times the best
PLATEAU_STEPS, PLATEAU_SHARE, GAIN = (
    100,
    0.25,
    0.002,
)  # shortest plateau in steps and share of the run; relative improvement
REMAINING_SHARE = 0.25  # of the run that must remain for a plateau to matter
EVAL_RISE, EVAL_RISE_TIMES = 1.01, 2  # eval loss over its best, so many times in a row
WAIT_SHARE, WAIT_STEPS, WAIT_S = 0.2, 20, 30.0  # share of time spent waiting for data, over so many steps and seconds
SETTLING = 3  # first steps of a group whose waits are ignored: data starts with them
SLOW, SLOW_STEPS, SLOW_TIMES = 1.5, 20, 18  # a straggler: times the others' time, in SLOW_TIMES of SLOW_STEPS steps


def not_finite(lines: Sequence[Line], run: config.RunConfig) -> str | None:
    """A loss or gradient is not finite. Steps that only adjust fp16's loss scale do not count."""
    line = lines[-1]
    if _finite(line.get("loss")) and (not line.get("skipped") or "loss_scale" in line):
        return None
    step = line["step"]
    return (
        f"loss or gradient is not finite; the step was skipped (limit train.max_bad_steps: {run.train.max_bad_steps}). Check "
        f"its records: ftray data order <run> --steps {step}:{step + 1}. If it happens again, lower train.learning_rate "
        f"({run.train.learning_rate:g})"
    )


def rate_too_high(lines: Sequence[Line], run: config.RunConfig) -> str | None:
    """The loss rose and stays up: above its initial value, or far above its best."""
    tail, first = _losses(lines[-WINDOW * 4 :]), _losses(lines[: 4 * FIRST])[:FIRST]
    if len(lines) < FIRST + 2 * SETTLE_STEPS or len(tail) < 2 * SETTLE_STEPS or not first:
        return None
    now, began = median(tail[-2 * SETTLE_STEPS :]), median(first)
    best = min(median(tail[i : i + SETTLE_STEPS]) for i in range(0, len(tail) - SETTLE_STEPS + 1, SETTLE_STEPS))
    noise = 1.05 * median(abs(a - b) for a, b in pairwise(tail))  # a deviation, of normal noise
    above = min(tail[-SETTLE_STEPS:])
    if above > max(RISE * began, began + 3 * noise) or above > max(1.5 * RISE * max(best, 0.05), best + 6 * noise):
        return (
            f"the loss rose to {now:.3g} and stays there (initially {began:.3g}, at best {best:.3g}): the learning rate is too "
            f"high. Restart from a checkpoint (ftray train --from) with train.learning_rate at most a third of "
            f"{run.train.learning_rate:g}, or with a longer train.warmup"
        )
    return None


def spike(lines: Sequence[Line], run: config.RunConfig) -> str | None:
    """The loss jumped and came back; reported SETTLE_STEPS steps later."""
    losses = _losses(lines[-WINDOW - SETTLE_STEPS - 1 :])
    if len(losses) < WINDOW // 2 + SETTLE_STEPS + 1:
        return None
    *before, jumped = losses[:-SETTLE_STEPS]
    usual = median(before)
    deviation = 1.4826 * median(abs(x - usual) for x in before)
    limit = max(SPIKE * usual, usual + SIGMAS * deviation)
    if jumped <= limit or median(losses[-SETTLE_STEPS:]) > limit:
        return None
    step = lines[-SETTLE_STEPS - 1]["step"]
    return (
        f"the loss jumped from {usual:.3g} to {jumped:.3g} at step {step} and came back. Check its records: ftray data "
        f"order <run> --steps {step}:{step + 1}. If it happens again, lower train.learning_rate or train.max_grad_norm "
        f"({run.train.max_grad_norm:g})"
    )


def plateau(lines: Sequence[Line], run: config.RunConfig, num_steps: int) -> str | None:
    """The loss stopped improving with much of the run remaining."""
    window = max(PLATEAU_STEPS, int(PLATEAU_SHARE * num_steps))
    done = lines[-1]["step"] + 1
    if done % (window // 20) or len(lines) < window or num_steps - done < REMAINING_SHARE * num_steps:
        return None
    losses = _losses(lines[-window:])
    half = len(losses) // 2
    if half < PLATEAU_STEPS // 4 or median(losses[half:]) < (1 - GAIN) * median(losses[:half]):
        return None
    began, now = median(_losses(lines[:FIRST]) or [math.nan]), median(losses[half:])
    if now > 0.95 * began:
        return (
            f"the loss is still {now:.3g} after {done} steps (initially {began:.3g}): the model does not learn. Raise "
            f"train.learning_rate ({run.train.learning_rate:g}), and check the trained tokens: ftray data preview"
        )
    return (
        f"the loss has not improved for {window} steps ({now:.3g}), and {num_steps - done} steps remain. Set evaluate.every "
        "and evaluate.early_stopping, or raise train.learning_rate"
    )


def overfitting(lines: Sequence[Line], _: config.RunConfig) -> str | None:
    """The eval loss rises while the training loss falls."""
    if not _finite(lines[-1].get("eval_loss")):
        return None
    evals = [(line["step"] + 1, line["eval_loss"]) for line in lines if _finite(line.get("eval_loss"))]
    if len(evals) < EVAL_RISE_TIMES + 1:
        return None
    step, best = min(evals, key=lambda pair: pair[1])
    after = [loss for at, loss in evals[-EVAL_RISE_TIMES:] if at > step and loss > EVAL_RISE * best]
    if len(after) < EVAL_RISE_TIMES:
        return None
    then = _losses([line for line in lines if step - WINDOW <= line["step"] < step])
    now = _losses(lines[-WINDOW:])
    if not then or not now or median(now) >= median(then):
        return None
    return (
        f"the eval loss rose from {best:.3g} (step {step}) to {after[-1]:.3g} while the training loss fell from "
        f"{median(then):.3g} to {median(now):.3g}: the model overfits. The best checkpoint is kept. Set "
        "evaluate.early_stopping, train fewer epochs, add data, or raise method.dropout"
    )


def starving(lines: Sequence[Line], _: config.RunConfig) -> str | None:
    """Workers wait for data, for long enough to matter: short steps on a busy machine wait now and then."""
    recent: list[Line] = []
    spent = 0.0
    for line in reversed(lines[SETTLING:]):
        if len(recent) >= WAIT_STEPS and spent >= WAIT_S:
            break
        if line.get("tokens_per_s"):
            recent.append(line)
            spent += line["num_tokens"] / line["tokens_per_s"]
    if len(recent) < WAIT_STEPS or spent < WAIT_S:
        return None
    *waits, _longest = sorted(line["data_wait_s"] for line in recent)  # one wait may be the end of an epoch
    waited = sum(waits)
    if waited < WAIT_SHARE * spent:
        return None
    return (
        f"workers wait for data {waited / spent:.0%} of the time, and GPUs idle. Add CPUs to the cluster beyond "
        "scale.cpus_per_worker, move the data closer, use larger files, or raise data.chunk_mb"
    )


def straggler(lines: Sequence[Line], _: config.RunConfig) -> str | None:
    """One worker is slower than the others most of the time."""
    recent = [line for line in lines[-SLOW_STEPS:] if "slowest_rank" in line]
    if len(recent) < SLOW_STEPS:
        return None
    ranks = [line["slowest_rank"] for line in recent if line["slowest_by"] >= SLOW]
    rank = max(set(ranks), key=ranks.count, default=None)
    if rank is None or ranks.count(rank) < SLOW_TIMES:
        return None
    by = median(line["slowest_by"] for line in recent if line["slowest_rank"] == rank)
    return (
        f"worker {rank} takes {by:.1f} times as long as the others, which wait for it. Check its machine with ftray doctor "
        "(other load, heat, another GPU type), or remove it: the run continues with fewer workers if scale.num_workers allows"
    )


RULES: dict[str, Callable[[Sequence[Line], config.RunConfig], str | None]] = {
    "not finite": not_finite,
    "learning rate too high": rate_too_high,
    "spike": spike,
    "overfitting": overfitting,
    "starving": starving,
    "straggler": straggler,
}
SILENCES = {"learning rate too high": ("spike", "plateau"), "not finite": ("spike",)}  # consequences


class AlertMonitor:
    """Applies the rules to a run and raises each kind of alert once.

    Args:
        run: The run's configuration.
        num_steps: Steps of the whole run.
        before: Metrics of the steps before this driver.
    """

    def __init__(self, run: config.RunConfig, num_steps: int, before: Sequence[Line] = ()) -> None:
        self._run, self._num_steps, self._raised = run, num_steps, set[str]()
        self._lines: list[dict[str, Any]] = [dict(line) for line in before]
        self._group_start = len(self._lines)  # index of the current worker group's first line

    def subscribe(self, bus: EventBus, warn: Callable[[str], None]) -> None:
        """Checks each step and eval, and emits AlertRaised on the same bus. A rule that fails never ends the run."""

        def check() -> None:
            try:
                alerts = self.check()
            except (ArithmeticError, LookupError, TypeError, ValueError) as err:
                warn(f"an alert rule failed ({type(err).__name__}: {err}); this is a bug in ftray, please report it")
                return
            for alert in alerts:
                bus.emit(alert)

        def add_step(event: StepFinished) -> None:
            self.add_step(event)
            check()

        def add_eval(event: EvalFinished) -> None:
            if self._lines:
                self._lines[-1]["eval_loss"] = event.eval_loss
                check()

        bus.subscribe(TrainingStarted, self.start_group)
        bus.subscribe(StepFinished, add_step)
        bus.subscribe(EvalFinished, add_eval)

    def start_group(self, event: TrainingStarted) -> None:
        """A new worker group repeats the steps since the checkpoint."""
        self._lines = [line for line in self._lines if line["step"] < event.step]
        self._group_start = len(self._lines)

    def add_step(self, event: StepFinished) -> None:
        """Adds the metrics of a step."""
        self._lines.append(payload(event))

    def check(self) -> list[AlertRaised]:
        """New alerts after the last step or eval."""
        alerts = []
        step = int(self._lines[-1]["step"])
        group = self._lines[self._group_start :]
        for kind in (*RULES, "plateau"):
            if kind in self._raised:
                continue
            lines = group if kind in ("starving", "straggler") else self._lines
            text = self._text(kind, lines)
            if text is not None:
                self._raised |= {kind, *SILENCES.get(kind, ())}
                alerts.append(AlertRaised(kind, step, text))
        return alerts

    def _text(self, kind: str, lines: Sequence[Line]) -> str | None:
        if kind == "plateau":
            return plateau(lines, self._run, self._num_steps)
        return RULES[kind](lines, self._run) if lines else None


def _losses(lines: Sequence[Line]) -> list[float]:
    return [line["loss"] for line in lines if _finite(line.get("loss"))]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
