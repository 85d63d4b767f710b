"""Whether requests still look like what a model was trained on: lengths and scripts of prompts, and empty answers.

Plain Python over the last requests of each model; knows no index, no engine and no HTTP. What was trained on comes as the
few figures that a run keeps in `data/reference.json`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftray.chat.scripts import count_scripts

LAST, LEAST = 1000, 100  # requests that are looked at, and from how many on something is said
MAX_CHARS = 20_000  # of a prompt: a longer one's beginning tells its scripts


@dataclass(frozen=True)
class RequestSample:
    """One request. scripts: letters of its prompt by script."""

    num_prompt_tokens: int
    scripts: Mapping[str, int]
    is_empty: bool


@dataclass(frozen=True)
class DriftFigures:
    """prompt_tokens: population stability index of prompts' lengths over the training set's deciles (0: the same; above
    0.25 is usually called a shift). scripts: share of letters that would have to be of another script (0 to 1). empty:
    share of answers without text; training has none. None: unknown."""

    prompt_tokens: float | None
    scripts: float | None
    empty: float


class DriftMonitor:
    """The last requests of each model."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[RequestSample]] = {}

    def add(self, model: str, seen: RequestSample) -> None:
        self._seen.setdefault(model, deque(maxlen=LAST)).append(seen)

    def models(self) -> list[str]:
        """Those that have answered often enough."""
        return [model for model, seen in list(self._seen.items()) if len(seen) >= LEAST]

    def figures(self, model: str, reference: Mapping[str, Any] | None) -> DriftFigures:
        """Of the last requests of one of `models`, against its training data where that is known."""
        seen = list(self._seen[model])  # at once: others may be added from another thread
        empty = sum(one.is_empty for one in seen) / len(seen)
        if not reference:
            return DriftFigures(None, None, empty)
        letters = Counter[str]()
        for one in seen:
            letters.update(one.scripts)
        deciles = reference.get("prompt_tokens") or []
        return DriftFigures(
            _stability([one.num_prompt_tokens for one in seen], deciles) if len(deciles) == 9 else None,
            _distance(letters, reference.get("scripts") or {}) if letters.total() else None,
            empty,
        )


def scripts_of(text: str) -> Mapping[str, int]:
    """Letters of a prompt by script."""
    found: Counter[str] = Counter()
    count_scripts(text[:MAX_CHARS], found)
    return found


def _stability(lengths: list[int], deciles: list[int]) -> float:
    """Sum of (p - q) ln(p / q) over the bins between distinct deciles; half a request is added to each bin."""
    edges = sorted(set(deciles))
    expected = [0.0] * (len(edges) + 1)
    for i in range(10):  # equal deciles share a bin
        expected[bisect_left(edges, deciles[i]) if i < 9 else len(edges)] += 0.1
    counts = Counter(bisect_left(edges, length) for length in lengths)
    total = len(lengths) + 0.5 * len(expected)
    found = [(counts[i] + 0.5) / total for i in range(len(expected))]
    wanted = [(q * len(lengths) + 0.5) / total for q in expected]
    return sum((p - q) * math.log(p / q) for p, q in zip(found, wanted, strict=True))


def _distance(letters: Counter[str], shares: Mapping[str, float]) -> float:
    """Total variation between two shares of scripts."""
    total = letters.total()
    return 0.5 * sum(
        abs(letters[script] / total - shares.get(script, 0.0)) for script in letters.keys() | shares.keys()
    )
