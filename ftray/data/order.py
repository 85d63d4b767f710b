"""The global order of rows, as a function. Pure: no Ray, no files, no clock, no random generator.

Two functions make it. `chunk_order` permutes a source's chunks for each epoch by a keyed hash; `Mixture` says which
source the n-th row of the run comes from, in closed form, so that any step can be found without replaying those before
it. Step t takes rows [t·G, (t+1)·G) of the run; rank r of W takes the r-th slice of these.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate


def key(*parts: object) -> bytes:
    """Eight bytes of blake2b over the parts' texts: the sort key of every shuffle here."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()


def chunk_order(chunks: Sequence[tuple[str, int]], seed: int, epoch: int, source: int) -> list[int]:
    """Places of the chunks in the order of an epoch. chunks: (path relative to the source, start)."""
    return sorted(range(len(chunks)), key=lambda i: (key(seed, epoch, source, *chunks[i]), chunks[i]))


def row_order(num_rows: int, seed: int, epoch: int, source: int, path: str, start: int) -> list[int]:
    """Places of a chunk's rows in the order of an epoch."""
    return sorted(range(num_rows), key=lambda i: key(seed, epoch, source, path, start, i))


@dataclass(frozen=True)
class Cursor:
    """Where a source stands: the next row is `row` of the `chunk`-th chunk in the order of `epoch`."""

    epoch: int
    chunk: int
    row: int


@dataclass(frozen=True)
class Mixture:
    """Which source each row of the run comes from, by stride scheduling.

    The k-th row of a source of share w is due at (k + ½) / w; rows are taken in the order of their due times, ties by
    the source's place. So every window of n rows holds n·w rows of a source within one row for each other source.
    num_rows: rows of each source in one pass. weights: relative shares; None takes each source's rows exactly once an
    epoch.
    """

    num_rows: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Exact share of each source; they sum to 1."""
        parts = [Fraction(str(part)) for part in (self.num_rows if self.weights is None else self.weights)]
        return tuple(p / sum(parts) for p in parts)

    @property
    def rows_per_epoch(self) -> int:
        """Rows until the source that is largest relative to its share has been seen once; without weights, all rows."""
        if self.weights is None:
            return sum(self.num_rows)
        return max(-(-n // share) for n, share in zip(self.num_rows, self.shares, strict=True))

    def counts(self, n: int) -> list[int]:
        """Rows of each source among the first n rows of the run."""
        return self._state(n)[0]

    def sources(self, start: int) -> Iterator[int]:
        """Sources of the rows start, start + 1, … without end."""
        counts, heap = self._state(start)
        shares = self.shares
        while True:
            _, i = heap[0]
            counts[i] += 1
            heapq.heapreplace(heap, (_due(counts[i], shares[i]), i))
            yield i

    def _state(self, n: int) -> tuple[list[int], list[tuple[Fraction, int]]]:
        # A count that is surely not too high, then the few rows that are missing in order of their due times.
        shares = self.shares
        counts = [max(0, int(w * (n - len(shares))) - 1) for w in shares]
        heap = [(_due(c, w), i) for i, (c, w) in enumerate(zip(counts, shares, strict=True))]
        heapq.heapify(heap)
        for _ in range(n - sum(counts)):
            _, i = heap[0]
            counts[i] += 1
            heapq.heapreplace(heap, (_due(counts[i], shares[i]), i))
        return counts, heap


def _due(count: int, share: Fraction) -> Fraction:
    return (count + Fraction(1, 2)) / share


def find_cursor(
    k: int, rows_by_chunk: Sequence[int], chunks: Sequence[tuple[str, int]], seed: int, source: int
) -> Cursor:
    """Cursor of the k-th row (from 0) that a source gives over all epochs. rows_by_chunk: in the chunks' own order."""
    total = sum(rows_by_chunk)
    epoch, rest = divmod(k, total)
    ends = list(accumulate(rows_by_chunk[i] for i in chunk_order(chunks, seed, epoch, source)))
    place = bisect_right(ends, rest)
    return Cursor(epoch, place, rest - (ends[place - 1] if place else 0))
