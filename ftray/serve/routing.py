"""A/B tests and canaries: selects the model for a request for `default`, and takes a failing canary out of rotation.

Plain Python on recorded times and failures, with storage for decisions that all replicas share; no HTTP, engines or Ray. The
decision to remove a canary is one file, written by the first replica that detects a reason. The other replicas read it, and
so does the next start of the endpoint, until `ab` or `canary` change.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import random
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from statistics import median
from typing import Any

from ftray import config, storage
from ftray.errors import StorageError

ALIAS = "default"
MIN_ANSWERS, LAST_ANSWERS = 20, 200  # MIN_ANSWERS: minimum number of times to compare
LAST_OTHERS, MIN_OTHERS = 1000, 50  # answers of each other model to compare the canary's failures with
MIN_FAILED, CHANCE = 3, 0.01
POLL_S = 2.0
logger = logging.getLogger(__name__)


def pick(weights: Mapping[str, float], user: str | None) -> str:
    """Draws a model by its share; always the same one for the same user and shares. Raises ValueError if no share is above 0."""
    total = sum(weights.values())
    if not total > 0:
        raise ValueError("no share above 0")
    drawn = random.random()
    if user is not None:
        drawn = int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "big") / 2**64
    left = drawn * total
    for model, weight in weights.items():
        left -= weight
        if left < 0:
            return model
    return next(model for model in reversed(list(weights)) if weights[model] > 0)  # rounding at the very end


class Router:
    """Selects models by their shares, and stops the canary when its answers are worse.

    Args:
        weights: Share of each model; empty if there is no model `default`.
        canary: The canary and its limits.
        place: The run directory, where replicas share the decision.
    """

    def __init__(
        self, weights: Mapping[str, float], canary: config.CanaryConfig | None = None, place: str | None = None
    ) -> None:
        self._weights, self._canary, self._place = dict(weights), canary, place
        self._failed: dict[str, deque[tuple[int, bool]]] = {}  # (number among all answers, whether it failed)
        self._number = 0
        self._first: dict[str, deque[float]] = {}
        self.event: dict[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is a model `default`."""
        return bool(self._weights)

    def choose(self, user: str | None, available: Collection[str]) -> str | None:
        """The model for one request, out of the available ones; None if none of them has a share."""
        weights = {model: weight for model, weight in self._weights.items() if model in available}
        if self.event is not None and self._canary is not None:
            weights.pop(self._canary.model, None)
        try:
            return pick(weights, user)
        except ValueError:
            return None

    def record_first_text(self, model: str, first_s: float) -> None:
        """Records an answer's time to first text in seconds."""
        if self._canary is not None and model in self._weights:
            self._first.setdefault(model, deque(maxlen=LAST_ANSWERS)).append(first_s)
            self._judge()

    def record(self, model: str, *, failed: bool) -> None:
        """Records the end of an answer."""
        if self._canary is not None and model in self._weights:
            most = LAST_ANSWERS if model == self._canary.model else LAST_OTHERS
            self._number += 1
            self._failed.setdefault(model, deque(maxlen=most)).append((self._number, failed))
            self._judge()

    def _judge(self) -> None:
        assert self._canary is not None
        if self.event is None and (reason := self._reason()):
            self.event = {
                "event": "canary_returned",
                "model": self._canary.model,
                "share": self._weights[self._canary.model],
                "reason": reason,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            logger.warning("the canary %s gets no more requests: %s", self._canary.model, reason)

    def _reason(self) -> str | None:
        assert self._canary is not None
        name = self._canary.model
        ends = self._failed.get(name, ())
        failed = [one for _, one in ends]
        since = ends[0][0] if ends else 0
        others_failed = [
            one
            for model, theirs in self._failed.items()
            if model != name
            for i, (number, one) in enumerate(reversed(theirs))
            if number >= since or i < MIN_OTHERS
        ]
        rate = sum(failed) / max(1, len(failed))
        if (
            rate > self._canary.max_error_rate
            and exceeds(sum(failed), len(failed), sum(others_failed), len(others_failed))
            and not self._all_fail(name)
        ):
            bound = f"max_error_rate {self._canary.max_error_rate:g}"
            return (
                f"{sum(failed)} of its last {len(failed)} answers failed ({rate:.1%}; {bound}); other "
                f"models: {sum(others_failed)} of {len(others_failed)}"
            )
        own = self._first.get(name, ())
        others = [s for model, times in self._first.items() if model != name for s in times]
        if min(len(own), len(others)) >= MIN_ANSWERS and median(own) > self._canary.max_latency_ratio * median(others):
            bound = f"max_latency_ratio {self._canary.max_latency_ratio:g}"
            others_s = median(others)
            return f"its median time to first text is {median(own):.3f} s, that of the other models {others_s:.3f} s ({bound})"
        return None

    def _all_fail(self, name: str) -> bool:
        """Whether the others fail at least half as often since the canary's first counted failure."""
        since = next(number for number, one in self._failed[name] if one)
        own = [one for number, one in self._failed[name] if number >= since]
        others = [
            one for model, theirs in self._failed.items() if model != name for number, one in theirs if number >= since
        ]
        return bool(others) and sum(others) / len(others) >= sum(own) / len(own) / 2

    async def start(self) -> None:
        """Reads an earlier decision or one of another replica, and starts polling for it."""
        if self._canary is not None and self._place is not None:
            await self._sync()
            self._task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stops polling, and writes a decision that is not written yet."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            await self._sync()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._sync()

    async def _sync(self) -> None:
        try:
            self.event = await asyncio.to_thread(self._exchange, self.event) or self.event
        except (StorageError, ValueError) as err:
            logger.error("could not write or read the canary's event: %s", err)

    def _exchange(self, mine: dict[str, Any] | None) -> dict[str, Any] | None:
        uri = event_uri(self._place or "", self._weights, self._canary)
        if mine is not None:
            storage.create_bytes(uri, json.dumps(mine, indent=1).encode())
        return storage.find_object(uri)


def exceeds(failed: int, total: int, others_failed: int, others_total: int) -> bool:
    """Whether a model fails significantly more often than the others.

    This takes at least MIN_FAILED failures, and a probability below CHANCE for so many at the others' rate. The others' rate is
    estimated from their answers, so the distribution is beta-binomial, with a prior of half a failure in 50 answers.

    Args:
        failed: Failed answers of the model.
        total: All answers of the model.
        others_failed: Failed answers of the other models.
        others_total: All answers of the other models.
    """
    if failed < MIN_FAILED or (others_total and others_failed / others_total >= failed / total):
        return False
    a, b = others_failed + 0.5, others_total - others_failed + 49.5
    fewer, term = 0.0, math.exp(_log_beta(a, b + total) - _log_beta(a, b))
    for k in range(failed):
        fewer += term
        term *= (total - k) / (k + 1) * (a + k) / (total - k - 1 + b)
    return 1 - fewer < CHANCE


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def event_uri(place: str, weights: Mapping[str, float], canary: config.CanaryConfig | None) -> str:
    """URI of the event file for this canary with these shares."""
    settings = json.dumps([sorted(weights.items()), canary and canary.model_dump()])
    return storage.join(place, "serve", "events", f"canary-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.json")
