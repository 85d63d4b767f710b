"""Detects whether requests differ from the training data: lengths and scripts of prompts, and empty answers.

Plain Python over the last requests of each model. Knows no index, engine or HTTP. The statistics of the training data come
from
the run's `data/reference.json`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftray.chat.scripts import count_scripts

LAST, LEAST = 1000, 100  # requests that are used, and the least number for a result
MAX_CHARS = 20_000  # of a prompt whose scripts are counted


@dataclass(frozen=True)
class RequestSample:
    """One request. scripts: letters of its prompt by script."""

    num_prompt_tokens: int
    scripts: Mapping[str, int]
    is_empty: bool


@dataclass(frozen=True)
class DriftFigures:
    """Differences between requests and training data. None: unknown.

    Attributes:
        prompt_tokens: Population stability index of the prompts' lengths over the training set's deciles. 0: equal; above
            0.25 is
            usually called a shift.
        scripts: Share of letters that would have to be in another script, 0 to 1.
        empty: Share of answers without text; training data has none.
    """

    prompt_tokens: float | None
    scripts: float | None
    empty: float


class DriftMonitor:
    """The last requests of each model."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[RequestSample]] = {}

    def add(self, model: str, sample: RequestSample) -> None:
        self._samples.setdefault(model, deque(maxlen=LAST)).append(sample)

    def models(self) -> list[str]:
        """Models with enough answers."""
        return [model for model, samples in list(self._samples.items()) if len(samples) >= LEAST]

    def figures(self, model: str, reference: Mapping[str, Any] | None) -> DriftFigures:
        """The drift of a model's last requests, compared with its training data if that is known."""
        samples = list(self._samples[model])  # a copy: another thread may add samples
        empty = sum(one.is_empty for one in samples) / len(samples)
        if not reference:
            return DriftFigures(None, None, empty)
        letters = Counter[str]()
        for one in samples:
            letters.update(one.scripts)
        deciles = reference.get("prompt_tokens") or []
        return DriftFigures(
            _stability([one.num_prompt_tokens for one in samples], deciles) if len(deciles) == 9 else None,
            _distance(letters, reference.get("scripts") or {}) if letters.total() else None,
            empty,
        )


def scripts_of(text: str) -> Mapping[str, int]:
    """Letters of a prompt by script."""
    counts: Counter[str] = Counter()
    count_scripts(text[:MAX_CHARS], counts)
    return counts


def _stability(lengths: list[int], deciles: list[int]) -> float:
    """Sum of (p - q) ln(p / q) over the bins between distinct deciles. Half a request is added to each bin."""
    edges = sorted(set(deciles))
    expected = [0.0] * (len(edges) + 1)
    for i in range(10):  # equal deciles share a bin
        expected[bisect_left(edges, deciles[i]) if i < 9 else len(edges)] += 0.1
    counts = Counter(bisect_left(edges, length) for length in lengths)
    total = len(lengths) + 0.5 * len(expected)
    observed = [(counts[i] + 0.5) / total for i in range(len(expected))]
    reference = [(q * len(lengths) + 0.5) / total for q in expected]
    return sum((p - q) * math.log(p / q) for p, q in zip(observed, reference, strict=True))


def _distance(letters: Counter[str], shares: Mapping[str, float]) -> float:
    """Total variation distance between two distributions of scripts."""
    total = letters.total()
    return 0.5 * sum(
        abs(letters[script] / total - shares.get(script, 0.0)) for script in letters.keys() | shares.keys()
    )
