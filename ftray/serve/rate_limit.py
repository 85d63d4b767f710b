"""Rate limits per API key: requests per minute, tokens per minute, tokens per day. Knows no HTTP.

Each replica counts for itself. The cost of an answer is known at its end, so running answers may overdraw a budget; the key
then waits until it is balanced.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ftray.serve.openai import RequestError

_MAX_CALLERS = 10_000


@dataclass(frozen=True)
class RateLimits:
    """Limits of each key; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


class TokenBucket:
    """Contains `capacity` and refills over `period_s`. May be overdrawn."""

    def __init__(self, capacity: float, period_s: float, now: float) -> None:
        self.capacity, self.per_s = capacity, capacity / period_s
        self.level, self._at = capacity, now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is available, or 0."""
        self.level = min(self.capacity, self.level + (now - self._at) * self.per_s)
        self._at = now
        return max(0.0, (amount - self.level) / self.per_s)

    def take(self, amount: float) -> None:
        """Takes an amount, available or not."""
        self.level -= amount


class RateLimiter:
    """The buckets of all keys, by the key's hash."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._callers: OrderedDict[str, dict[str, TokenBucket]] = OrderedDict()

    def admit(self, caller: str) -> None:
        """Counts a request. Raises RequestError (429) with the time to wait."""
        buckets, now = self._buckets(caller), self._clock()
        waits = {name: bucket.wait_s(1, now) for name, bucket in buckets.items()}
        if waits and (longest := max(waits, key=lambda name: waits[name])) and waits[longest] > 0:
            message = f"this key's {longest.replace('_', ' ')} are used up; retry later"
            raise RequestError(429, message, code="rate_limit_exceeded", retry_after_s=waits[longest])
        if "requests_per_minute" in buckets:
            buckets["requests_per_minute"].take(1)

    def charge(self, caller: str, num_tokens: int) -> None:
        """Counts the tokens of an answer and its prompt."""
        for name, bucket in self._buckets(caller).items():
            if name.startswith("tokens"):
                bucket.take(num_tokens)

    def _buckets(self, caller: str) -> dict[str, TokenBucket]:
        if caller not in self._callers:
            now = self._clock()
            self._callers[caller] = {
                name: TokenBucket(capacity, period_s, now)
                for name, capacity, period_s in (
                    ("requests_per_minute", self._limits.requests_per_minute, 60),
                    ("tokens_per_minute", self._limits.tokens_per_minute, 60),
                    ("tokens_per_day", self._limits.tokens_per_day, 86400),
                )
                if capacity is not None
            }
            while len(self._callers) > _MAX_CALLERS:
                self._callers.popitem(last=False)
        return self._callers[caller]
