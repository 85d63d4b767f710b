"""Which rank is slow: the time of each rank's own forward passes, in which no rank waits for another (below ZeRO-3)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ftray.train.parallel import DeviceMesh

if TYPE_CHECKING:
    from ftray.data.loader import RankBatch


class Stopwatch:
    """Adds up the time inside `with`. On a GPU it uses CUDA events: nothing waits for the GPU until `take`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pairs: list[tuple[Any, Any]] = []
        self._started_s = self._total_s = 0.0

    def __enter__(self) -> None:
        if self._on_gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._pairs.append(pair)
        self._started_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._total_s += time.monotonic() - self._started_s
        if self._on_gpu:
            self._pairs[-1][1].record()

    def take(self) -> float:
        """Seconds since the last call. On a GPU, call it after something that waited for the GPU."""
        total_s, self._total_s = self._total_s, 0.0
        if self._on_gpu:
            total_s = sum(start.elapsed_time(end) for start, end in self._pairs) / 1000
            self._pairs.clear()
        return total_s


class StragglerTimer(Stopwatch):
    """A stopwatch per rank, compared over ranks as part of the step's one reduction."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh.device)
        self._mesh = mesh

    def take_all(self) -> list[float]:
        """This rank's seconds at its place, zero elsewhere; the sum over ranks holds all of them."""
        seconds = [0.0] * self._mesh.world_size
        seconds[self._mesh.rank] = self.take()
        return seconds


def slowest(seconds: list[float]) -> dict[str, Any]:
    """The slowest rank and its time over the median of the others, as fields of StepFinished; {} for one rank."""
    if len(seconds) < 2:
        return {}
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = median(s for n, s in enumerate(seconds) if n != rank)
    return {"slowest_rank": rank, "slowest_by": round(seconds[rank] / max(others, 1e-9), 2)}


def timed(batches: Iterator[RankBatch]) -> Iterator[tuple[RankBatch, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    while True:
        started_s = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - started_s
