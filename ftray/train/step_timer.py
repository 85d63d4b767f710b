"""How long each rank's own forward passes take: the part of a step in which no rank waits for another (below ZeRO-3)."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch


class Stopwatch:
    """Adds up what runs inside `with`. On a GPU by its own clock: nothing is waited for until `take`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pairs: list[tuple[Any, Any]] = []
        self._began_s = self._total_s = 0.0

    def __enter__(self) -> None:
        if self._on_gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._pairs.append(pair)
        self._began_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._total_s += time.monotonic() - self._began_s
        if self._on_gpu:
            self._pairs[-1][1].record()

    def take(self) -> float:
        """Seconds since the last call. On a GPU call it after something that waited for the GPU."""
        total_s, self._total_s = self._total_s, 0.0
        if self._on_gpu:
            total_s = sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1000
            self._pairs.clear()
        return total_s


def slowest(seconds: list[float]) -> dict[str, Any]:
    """Which rank took longest, and how many times as long as the others; nothing for one rank alone."""
    if len(seconds) < 2:
        return {}
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = median(s for n, s in enumerate(seconds) if n != rank)
    return {"slowest_rank": rank, "slowest_by": round(seconds[rank] / max(others, 1e-9), 2)}
