"""What is going wrong in a run, in words, each with what to do. Pure functions of the lines of metrics; no Ray, no torch.

A rule looks at the lines so far and says a sentence or nothing; `Watch` hears a run step by step and says each kind once.
The rules are meant to be silent on a run that is well: they compare medians over windows, and wait for enough of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from ftray import config

Line = Mapping[str, Any]
FIRST = 5  # steps whose median is where the loss began
WINDOW = 32  # steps before one, that say what is usual there
CALM = 5  # steps after a spike, by which it is told from a rise that stays
SPIKE, SIGMAS = 1.5, 8.0  # times the usual loss, and deviations above it
RISE = 1.1  # times the loss at the start, or 1.5 × RISE the best: a rise
PLATEAU_STEPS, PLATEAU_SHARE, GAIN = 100, 0.25, 0.002  # at least so long, this share of the run; what counts as better
LEFT_SHARE = 0.25  # of the run, that must be left for a plateau to matter
GAP, GAP_TIMES = 1.01, 2  # held-out loss above its best, so many times in a row
WAITS, WAIT_STEPS, WAIT_S = 0.2, 20, 30.0  # share of the time that is waited for data, over so many steps and seconds
SETTLING = 3  # steps of a group that don't count for waits: data starts with it
SLOW, SLOW_STEPS, SLOW_TIMES = 1.5, 20, 18  # of the others' time; in so many of so many steps


@dataclass(frozen=True)
class Alert:
    """One alarm. kind: the rule's name."""

    kind: str
    step: int
    text: str


def not_finite(lines: Sequence[Line], run: config.RunConfig) -> str | None:
    """A loss or gradient that is not finite. fp16's search for its scale is none."""
    line = lines[-1]
    if _finite(line.get("loss")) and (not line.get("skipped") or "loss_scale" in line):
        return None
    step = line["step"]
    return (
        f"loss or gradient is not finite, and the step was skipped (allowed are {run.train.max_bad_steps}); look at its "
        f"records: ftray data order <run> --steps {step}:{step + 1}. If more follow, lower train.learning_rate "
        f"({run.train.learning_rate:g})"
    )


def rate_too_high(lines: Sequence[Line], run: config.RunConfig) -> str | None:
    """A loss that rose and stays: above where it began, or far above its best."""
    tail, first = _losses(lines[-WINDOW * 4 :]), _losses(lines[: 4 * FIRST])[:FIRST]
    if len(lines) < FIRST + 2 * CALM or len(tail) < 2 * CALM or not first:
        return None
    now, began = median(tail[-2 * CALM :]), median(first)
    best = min(median(tail[i : i + CALM]) for i in range(0, len(tail) - CALM + 1, CALM))
    noise = 1.05 * median(abs(a - b) for a, b in pairwise(tail))  # a deviation, of normal noise
    above = min(tail[-CALM:])
    if above > max(RISE * began, began + 3 * noise) or above > max(1.5 * RISE * max(best, 0.05), best + 6 * noise):
        return (
            f"the loss rose to {now:.3g} and stays there (it began at {began:.3g}, was {best:.3g} at its best): the learning "
            f"rate is too high; go back to a checkpoint (ftray train --from) with train.learning_rate a third of "
            f"{run.train.learning_rate:g} or less, or a longer train.warmup"
        )
    return None


def spike(lines: Sequence[Line], run: config.RunConfig) -> str | None:
    """A loss that jumped and came back, told CALM steps later."""
    losses = _losses(lines[-WINDOW - CALM - 1 :])
    if len(losses) < WINDOW // 2 + CALM + 1:
        return None
    *before, jumped = losses[:-CALM]
    usual = median(before)
    deviation = 1.4826 * median(abs(x - usual) for x in before)
    limit = max(SPIKE * usual, usual + SIGMAS * deviation)
    if jumped <= limit or median(losses[-CALM:]) > limit:
        return None
    step = lines[-CALM - 1]["step"]
    return (
        f"the loss jumped from {usual:.3g} to {jumped:.3g} at step {step} and came back; look at its records: ftray data "
        f"order <run> --steps {step}:{step + 1}. If it happens again, lower train.learning_rate or train.max_grad_norm "
        f"({run.train.max_grad_norm:g})"
    )


def plateau(lines: Sequence[Line], run: config.RunConfig, num_steps: int) -> str | None:
    """A loss that gets no better, with much of the run left."""
    window = max(PLATEAU_STEPS, int(PLATEAU_SHARE * num_steps))
    done = lines[-1]["step"] + 1
    if done % (window // 20) or len(lines) < window or num_steps - done < LEFT_SHARE * num_steps:
        return None
    losses = _losses(lines[-window:])
    half = len(losses) // 2
    if half < PLATEAU_STEPS // 4 or median(losses[half:]) < (1 - GAIN) * median(losses[:half]):
        return None
    began, now = median(_losses(lines[:FIRST]) or [math.nan]), median(losses[half:])
    if now > 0.95 * began:
        return (
            f"the loss is {now:.3g} after {done} steps, where it began at {began:.3g}: nothing is learned; raise "
            f"train.learning_rate ({run.train.learning_rate:g}), and look at what is learned: ftray data preview"
        )
    return (
        f"the loss has been no better for {window} steps ({now:.3g}): the {num_steps - done} that are left may bring nothing; "
        "set evaluate.every and evaluate.early_stopping, or raise train.learning_rate"
    )


def overfitting(lines: Sequence[Line], _: config.RunConfig) -> str | None:
    """A held-out loss that rises while the training loss falls."""
    if not _finite(lines[-1].get("heldout_loss")):
        return None
    held_out = [(line["step"] + 1, line["heldout_loss"]) for line in lines if _finite(line.get("heldout_loss"))]
    if len(held_out) < GAP_TIMES + 1:
        return None
    step, best = min(held_out, key=lambda pair: pair[1])
    after = [loss for at, loss in held_out[-GAP_TIMES:] if at > step and loss > GAP * best]
    if len(after) < GAP_TIMES:
        return None
    then = _losses([line for line in lines if step - WINDOW <= line["step"] < step])
    now = _losses(lines[-WINDOW:])
    if not then or not now or median(now) >= median(then):
        return None
    return (
        f"the held-out loss rose from {best:.3g} (step {step}) to {after[-1]:.3g} while the training loss fell from "
        f"{median(then):.3g} to {median(now):.3g}: the data is learned by heart. The best checkpoint is kept; set "
        "evaluate.early_stopping, train fewer epochs, add data, or raise method.dropout"
    )


def starving(lines: Sequence[Line], _: config.RunConfig) -> str | None:
    """Workers that wait for data, for long enough to matter: short steps on a busy machine wait now and then."""
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
    *waits, _longest = sorted(line["data_wait_s"] for line in recent)  # one may be an epoch's end
    waited = sum(waits)
    if waited < WAITS * spent:
        return None
    return (
        f"workers wait {waited / spent:.0%} of the time for data, and GPUs idle; give reading more CPUs (the cluster's, beside "
        "scale.cpus_per_worker), put the data nearer, cut it into larger files, or raise data.chunk_mb"
    )


def straggler(lines: Sequence[Line], _: config.RunConfig) -> str | None:
    """One worker that is slower than the others, most of the time."""
    recent = [line for line in lines[-SLOW_STEPS:] if "slowest_rank" in line]
    if len(recent) < SLOW_STEPS:
        return None
    ranks = [line["slowest_rank"] for line in recent if line["slowest_by"] >= SLOW]
    rank = max(set(ranks), key=ranks.count, default=None)
    if rank is None or ranks.count(rank) < SLOW_TIMES:
        return None
    by = median(line["slowest_by"] for line in recent if line["slowest_rank"] == rank)
    return (
        f"worker {rank} takes {by:.1f} times as long as the others, who wait for it; look at its machine (ftray doctor: other "
        "work, heat, another kind of GPU), or take it away: the run goes on with fewer where scale.num_workers allows"
    )


RULES: dict[str, Callable[[Sequence[Line], config.RunConfig], str | None]] = {
    "not finite": not_finite,
    "learning rate too high": rate_too_high,
    "spike": spike,
    "overfitting": overfitting,
    "starving": starving,
    "straggler": straggler,
}
SILENCES = {"learning rate too high": ("spike", "plateau"), "not finite": ("spike",)}  # what follows from it


class AlertMonitor:
    """Hears the events of a run. before: the lines of its steps so far."""

    def __init__(self, run: config.RunConfig, num_steps: int, before: Sequence[Line] = ()) -> None:
        self._run, self._num_steps, self._told = run, num_steps, set[str]()
        self._lines: list[dict[str, Any]] = [dict(line) for line in before]
        self._began = len(self._lines)  # of the lines since the last start

    def heard(self, event: Line) -> list[Alert]:
        """Takes an event of rank 0; returns the alarms that it gives."""
        kind = event["event"]
        if kind == "start":  # steps since the checkpoint are done again
            self._lines = [line for line in self._lines if line["step"] < event["step"]]
            self._began = len(self._lines)
        elif kind == "step":
            self._lines.append({name: value for name, value in event.items() if name != "event"})
            return self._look()
        elif kind == "heldout" and self._lines:
            self._lines[-1]["heldout_loss"] = event["heldout_loss"]
            return self._look()
        return []

    def _look(self) -> list[Alert]:
        found = []
        step = int(self._lines[-1]["step"])
        group = self._lines[self._began :]
        for kind in (*RULES, "plateau"):
            if kind in self._told:
                continue
            lines = group if kind in ("starving", "straggler") else self._lines
            text = self._text(kind, lines)
            if text is not None:
                self._told |= {kind, *SILENCES.get(kind, ())}
                found.append(Alert(kind, step, text))
        return found

    def _text(self, kind: str, lines: Sequence[Line]) -> str | None:
        if kind == "plateau":
            return plateau(lines, self._run, self._num_steps)
        return RULES[kind](lines, self._run) if lines else None


def _losses(lines: Sequence[Line]) -> list[float]:
    return [line["loss"] for line in lines if _finite(line.get("loss"))]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
