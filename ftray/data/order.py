"""The global order of packed sequences as a pure function: no Ray, files, clock or random generator.

`chunk_order` permutes a source's chunks in each epoch by a keyed hash. `Mixture` gives the source of the n-th sequence of the
run in closed form, so any step can be found without replaying the steps before it. With a global batch size G, step t takes
the sequences [t·G, (t+1)·G) of the run, and data rank r takes the r-th slice of them.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate


def steps_of(epochs: float, sequences_per_epoch: int, global_batch_size: int, max_steps: int | None = None) -> int:
    """Optimizer steps of a run: the whole global batches in its epochs, or max_steps."""
    return max_steps or int(round(epochs * sequences_per_epoch, 6)) // global_batch_size


def tail_of(epochs: float, sequences_per_epoch: int, global_batch_size: int) -> int:
    """Packed sequences at the end of a run's epochs that fill no global batch."""
    return (
        round(epochs * sequences_per_epoch)
        - steps_of(epochs, sequences_per_epoch, global_batch_size) * global_batch_size
    )


def key(*parts: object) -> bytes:
    """The sort key of every shuffle: eight bytes of blake2b over the parts' texts."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()


def chunk_order(chunks: Sequence[tuple[str, int]], seed: int, epoch: int, source: int) -> list[int]:
    """The order of a source's chunks in an epoch.

    Args:
        chunks: (path relative to the source, start) of each chunk.
        seed: The run's seed.
        epoch: The epoch, from 0.
        source: The number of the source.

    Returns:
        Indices into `chunks`.
    """
    return sorted(range(len(chunks)), key=lambda i: (key(seed, epoch, source, *chunks[i]), chunks[i]))


def sequence_order(num_sequences: int, seed: int, epoch: int, source: int, path: str, start: int) -> list[int]:
    """The order of a chunk's packed sequences in an epoch, as indices into their packing order."""
    return sorted(range(num_sequences), key=lambda i: key(seed, epoch, source, path, start, i))


@dataclass(frozen=True)
class Cursor:
    """The position of a source: its next packed sequence is number `sequence` of the `chunk`-th chunk in the order of `epoch`."""

    epoch: int
    chunk: int
    sequence: int


@dataclass(frozen=True)
class Mixture:
    """The source of each packed sequence of the run, by stride scheduling.

    The k-th sequence of a source with share w is due at (k + ½) / w. Sequences are taken in the order of their due times; ties go
    to the earlier source. Every window of n sequences therefore contains n·w sequences of a source, give or take one per other
    source.

    Args:
        num_sequences: Packed sequences of each source in one pass.
        weights: Relative shares. None takes each sequence of each source exactly once per epoch.
    """

    num_sequences: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Exact share of each source. They sum to 1."""
        parts = [Fraction(str(part)) for part in (self.num_sequences if self.weights is None else self.weights)]
        return tuple(p / sum(parts) for p in parts)

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences until every source has been seen once; without weights, the number of all sequences."""
        if self.weights is None:
            return sum(self.num_sequences)
        return max(-(-n // share) for n, share in zip(self.num_sequences, self.shares, strict=True))

    def counts(self, n: int) -> list[int]:
        """Sequences of each source among the first n sequences of the run."""
        return self._state(n)[0]

    def sources(self, start: int) -> Iterator[int]:
        """Sources of the sequences start, start + 1, …, without end."""
        counts, heap = self._state(start)
        shares = self.shares
        while True:
            _, i = heap[0]
            counts[i] += 1
            heapq.heapreplace(heap, (_due(counts[i], shares[i]), i))
            yield i

    def _state(self, n: int) -> tuple[list[int], list[tuple[Fraction, int]]]:
        # Start with counts that are certainly not too high, then add the missing sequences in order of their due times.
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
    k: int, sequences_by_chunk: Sequence[int], chunks: Sequence[tuple[str, int]], seed: int, source: int
) -> Cursor:
    """The position of the k-th sequence (from 0) of a source over all epochs.

    Args:
        k: The number of the sequence.
        sequences_by_chunk: Packed sequences of each chunk.
        chunks: (path relative to the source, start) of each chunk.
        seed: The run's seed.
        source: The number of the source.
    """
    total = sum(sequences_by_chunk)
    epoch, rest = divmod(k, total)
    ends = list(accumulate(sequences_by_chunk[i] for i in chunk_order(chunks, seed, epoch, source)))
    place = bisect_right(ends, rest)
    return Cursor(epoch, place, rest - (ends[place - 1] if place else 0))
