"""Feeds packed sequences to the ranks in the planned order, with Ray Data.

One actor (`BatchCoordinator`) iterates an order-preserving Ray Data execution over the plan's chunks, mixes the sources
sequence by sequence and tells each rank which parts of which blocks to fetch. Ranks fetch the blocks themselves, so no
sequence passes through the coordinator. Ray Train's `DataConfig.configure` is the entry point:
`ray.train.get_dataset_shard("train")` returns a `RankLoader`. Knows nothing of models or losses.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.train import DataConfig

from ftray.data.chunks import DatasetSpec, pack_chunk
from ftray.data.index import ChunkFacts, Index
from ftray.data.order import Mixture, chunk_order, find_cursor, sequence_order, steps_of
from ftray.data.ray_options import SEGMENT, open_dataset
from ftray.errors import DataError

STEPS_AHEAD = 8  # steps that the coordinator prepares before the slowest rank requests them
FETCH_AHEAD = 2  # steps that a rank requests in advance
TOKEN_BYTES = 12  # three int32 per token of a sequence


@dataclass(frozen=True)
class LoadPlan:
    """Everything that decides which packed sequences a step takes.

    Attributes:
        stream: The training data.
        sources: The chunks of each source.
        mixture: How the sources are mixed.
        packed: For each source, references to its chunks' sequences in packing order, if several runs of one Ray share them
            (`share_sequences`). It changes no batch.
    """

    stream: DatasetSpec
    sources: tuple[tuple[ChunkFacts, ...], ...]
    mixture: Mixture
    seed: int
    global_batch_size: int
    num_steps: int
    packed: tuple[tuple[ray.ObjectRef, ...], ...] | None = None

    @property
    def most_documents(self) -> int:
        """The largest number of documents in one sequence."""
        return max(f.most_documents for facts in self.sources for f in facts)

    def chunk_keys(self, source: int) -> list[tuple[str, int]]:
        """(path, start) of a source's chunks, as `order` takes them."""
        return [(f.chunk.path, f.chunk.start) for f in self.sources[source]]

    def position(self, step: int) -> list[dict[str, int]]:
        """The cursor of each source before a step, for the checkpoint."""
        counts = self.mixture.counts(step * self.global_batch_size)
        cursors = [
            find_cursor(k, [f.num_sequences for f in self.sources[i]], self.chunk_keys(i), self.seed, i)
            for i, k in enumerate(counts)
        ]
        return [{"epoch": c.epoch, "chunk": c.chunk, "sequence": c.sequence} for c in cursors]


def make_plan(
    index: Index, stream: DatasetSpec, seed: int, global_batch_size: int, epochs: float, max_steps: int | None
) -> LoadPlan:
    """The plan of a run. num_steps counts whole global batches in `epochs`, or is max_steps."""
    mixture = index.mixture(stream)
    num_steps = steps_of(epochs, mixture.sequences_per_epoch, global_batch_size, max_steps)
    sources = tuple(tuple(index.of_source(i)) for i in range(len(stream.sources)))
    return LoadPlan(stream, sources, mixture, seed, global_batch_size, num_steps)


@dataclass(frozen=True)
class RankBatch:
    """A rank's packed sequences of one step.

    Attributes:
        step: The step.
        first_sequence: The number of its first sequence in the run.
        input_ids: int32 [sequences, max_seq_len].
        labels: int32 [sequences, max_seq_len].
        position_ids: int32 [sequences, max_seq_len].
        num_tokens: int32 [sequences], tokens that are not padding.
        sequence_ids: (source, epoch, chunk, sequence) of each sequence.
    """

    step: int
    first_sequence: int
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    position_ids: npt.NDArray[np.int32]
    num_tokens: npt.NDArray[np.int32]
    sequence_ids: list[tuple[int, int, int, int]] = field(default_factory=list)


def sequence_table(item: tuple[int, int, ChunkFacts], stream: DatasetSpec, seed: int | None) -> pa.Table:
    """The sequences of a chunk as an Arrow table, in the order of the epoch (seed None: in packing order)."""
    number, epoch, facts = item
    chunk = facts.chunk
    packed = pack_chunk(chunk, stream)
    if packed.digest != facts.digest:  # size and etag are unchanged, the content is not
        raise DataError(
            f"{chunk.name} no longer gives the sequences that were indexed: the file or the tokenizer changed while the run was "
            "using it; restore it, or start a new run under another name"
        )
    n = len(packed.sequences)
    places = range(n) if seed is None else sequence_order(n, seed, epoch, chunk.source, chunk.path, chunk.start)
    sequences = [packed.sequences[i] for i in places]

    def matrix(name: str) -> pa.FixedSizeListArray:
        flat = np.concatenate([getattr(r, name) for r in sequences]) if sequences else np.zeros(0, np.int32)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.int32()), stream.max_seq_len)

    return pa.table(
        {
            "input_ids": matrix("input_ids"),
            "labels": matrix("labels"),
            "position_ids": matrix("position_ids"),
            "num_tokens": pa.array([r.num_tokens for r in sequences], pa.int32()),
            "source": pa.array([chunk.source] * n, pa.int32()),
            "epoch": pa.array([epoch] * n, pa.int32()),
            "chunk": pa.array([number] * n, pa.int32()),
            "sequence": pa.array(list(places), pa.int32()),
            "records": pa.array(
                [[packed.examples[packed.owners[d]].position for d in r.documents] for r in sequences],
                pa.list_(pa.int64()),
            ),
        }
    )


def to_batch(table: pa.Table, step: int = 0, first_sequence: int = 0) -> RankBatch:
    """A table of sequences as numpy arrays."""

    def matrix(name: str) -> npt.NDArray[np.int32]:
        column = table.column(name).combine_chunks()
        flat: npt.NDArray[np.int32] = column.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), -1)

    ids = [table.column(name).to_pylist() for name in ("source", "epoch", "chunk", "sequence")]
    return RankBatch(
        step,
        first_sequence,
        matrix("input_ids"),
        matrix("labels"),
        matrix("position_ids"),
        table.column("num_tokens").to_numpy(),
        list(zip(*ids, strict=True)),
    )


def eval_table(index: Index, stream: DatasetSpec) -> pa.Table:
    """All sequences of the eval set in source and file order, as one table."""
    items = [(i, 0, f) for i, f in enumerate(index.facts) if f.num_sequences]
    dataset = open_dataset(partial(sequence_table, stream=stream, seed=None), items)
    return pa.concat_tables(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def share_sequences(plan: LoadPlan, most_bytes: float) -> tuple[tuple[ray.ObjectRef, ...], ...] | None:
    """Reads and tokenizes all chunks once, to be shared by several runs (`LoadPlan.packed`).

    Returns:
        References to the sequences of each chunk, or None if they take more than most_bytes.
    """
    num_sequences = sum(facts.num_sequences for source in plan.sources for facts in source)
    if num_sequences * plan.stream.max_seq_len * TOKEN_BYTES > most_bytes:
        return None
    shared = []
    for source in plan.sources:
        items = [(i, 0, facts) for i, facts in enumerate(source)]
        refs: list[ray.ObjectRef] = []
        for lo in range(0, len(items), SEGMENT):
            dataset = open_dataset(partial(sequence_table, stream=plan.stream, seed=None), items[lo : lo + SEGMENT])
            refs += [block.ref for bundle in dataset.iter_internal_ref_bundles() for block in bundle.blocks]
        shared.append(tuple(refs))
    return tuple(shared)


Span = tuple[ray.ObjectRef, int, int, int]  # sequences [lo, hi) of a block, in an epoch


class BatchCoordinator:
    """The coordinator, an actor. Ranks call `begin` once and then `get` for each step, in order."""

    def __init__(self, plan: LoadPlan, world_size: int) -> None:
        self._plan, self._world_size = plan, world_size
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ready: dict[int, list[list[Span]]] = {}
        self._acked = [0] * world_size
        self._error: BaseException | None = None

    def begin(self, step: int) -> None:
        """Starts preparing steps from `step`. Only the first call counts; all ranks pass the same step."""
        with self._changed:
            if self._thread is None:
                self._acked = [step] * self._world_size
                self._thread = threading.Thread(target=self._prepare, args=(step,), daemon=True)
                self._thread.start()

    def get(self, rank: int, step: int) -> list[Span]:
        """A rank's spans of sequences for a step.

        Steps before `step` are finished. A threaded actor may run calls out of order, so the step itself shows
        the rank's progress.
        """
        with self._changed:
            self._acked[rank] = max(self._acked[rank], step - FETCH_AHEAD)
            for old in [s for s in self._ready if s < min(self._acked)]:
                del self._ready[old]
            self._changed.notify_all()
            self._changed.wait_for(lambda: step in self._ready or self._error is not None)
            if step not in self._ready and self._error is not None:
                raise self._error
            return self._ready[step][rank]

    def _prepare(self, step: int) -> None:
        try:
            size, share = self._plan.global_batch_size, self._plan.global_batch_size // self._world_size
            sequences = self._sequences(step * size)
            while step < self._plan.num_steps:
                batch = list(islice(sequences, size))
                parts = [_coalesce(batch[r * share : (r + 1) * share]) for r in range(self._world_size)]
                with self._changed:
                    self._changed.wait_for(lambda s=step: s - min(self._acked) <= STEPS_AHEAD)  # type: ignore[misc]
                    self._ready[step] = parts
                    step += 1
                    self._changed.notify_all()
        except BaseException as err:  # noqa: BLE001 - handed to the ranks, which are waiting for this thread
            with self._changed:
                self._error = err
                self._changed.notify_all()

    def _sequences(self, start: int) -> Iterator[tuple[ray.ObjectRef, int, int]]:
        """(block, index in it, epoch) of the run's sequences start, start + 1, …"""
        counts = self._plan.mixture.counts(start)
        streams = [self._source_sequences(i, k) for i, k in enumerate(counts)]
        for source in self._plan.mixture.sources(start):
            yield next(streams[source])

    def _source_sequences(self, source: int, k: int) -> Iterator[tuple[ray.ObjectRef, int, int]]:
        """Sequences of one source from its k-th, epoch after epoch. Reads no chunk before the one with the k-th."""
        plan, facts, keys = self._plan, self._plan.sources[source], self._plan.chunk_keys(source)
        cursor = find_cursor(k, [f.num_sequences for f in facts], keys, plan.seed, source)
        epoch, place, skip = cursor.epoch, cursor.chunk, cursor.sequence
        while True:
            items = [(i, epoch, facts[i]) for i in chunk_order(keys, plan.seed, epoch, source)]
            if plan.packed is not None:
                for i, _, chunk_facts in items[place:]:
                    where = (chunk_facts.chunk.source, chunk_facts.chunk.path, chunk_facts.chunk.start)
                    for sequence in sequence_order(chunk_facts.num_sequences, plan.seed, epoch, *where)[skip:]:
                        yield plan.packed[source][i], int(sequence), epoch
                    skip = 0
                place = len(items)
            while place < len(items):
                segment = items[place : place + SEGMENT]
                place += len(segment)
                dataset = open_dataset(partial(sequence_table, stream=plan.stream, seed=plan.seed), segment)
                for bundle in dataset.iter_internal_ref_bundles():
                    for block in bundle.blocks:
                        num_sequences = int(block.metadata.num_rows or 0)
                        lo, skip = min(skip, num_sequences), max(0, skip - num_sequences)
                        for sequence in range(lo, num_sequences):
                            yield block.ref, sequence, epoch
            epoch, place = epoch + 1, 0


def _coalesce(sequences: list[tuple[ray.ObjectRef, int, int]]) -> list[Span]:
    runs: list[Span] = []
    for ref, sequence, epoch in sequences:
        if runs and runs[-1][0] == ref and runs[-1][2:] == (sequence, epoch):
            runs[-1] = (ref, runs[-1][1], sequence + 1, epoch)
        else:
            runs.append((ref, sequence, sequence + 1, epoch))
    return runs


def _piece(block: pa.Table, lo: int, hi: int, epoch: int) -> pa.Table:
    """Sequences [lo, hi) of a block, labeled with an epoch: shared blocks (`share_sequences`) serve every epoch."""
    sequences = block.slice(lo, hi - lo)
    column = sequences.column_names.index("epoch")
    return sequences.set_column(column, "epoch", pa.array([epoch] * sequences.num_rows, pa.int32()))


class RankLoader:
    """The value of `ray.train.get_dataset_shard("train")` on a rank."""

    def __init__(self, coordinator: Any, plan: LoadPlan, rank: int, world_size: int) -> None:
        self._coordinator, self.plan, self._rank, self._world_size = coordinator, plan, rank, world_size

    def batches(self, start_step: int) -> Iterator[RankBatch]:
        """This rank's batches of the steps start_step … num_steps - 1."""
        share = self.plan.global_batch_size // self._world_size
        for step, table in enumerate(self.tables(start_step), start_step):
            yield to_batch(table, step, step * self.plan.global_batch_size + self._rank * share)

    def tables(self, start_step: int) -> Iterator[pa.Table]:
        """This rank's sequences of the steps start_step … num_steps - 1, with their origin (see `sequence_table`)."""
        ray.get(self._coordinator.begin.remote(start_step))
        last = self.plan.num_steps
        requests = deque(
            self._coordinator.get.remote(self._rank, s) for s in range(start_step, min(start_step + FETCH_AHEAD, last))
        )
        blocks: dict[ray.ObjectRef, pa.Table] = {}
        for step in range(start_step, last):
            if step + FETCH_AHEAD < last:
                requests.append(self._coordinator.get.remote(self._rank, step + FETCH_AHEAD))
            runs: list[Span] = ray.get(requests.popleft())
            needed = list(dict.fromkeys(ref for ref, *_ in runs))
            missing = [ref for ref in needed if ref not in blocks]
            fetched = dict(zip(missing, ray.get(missing), strict=True))
            blocks = {ref: blocks.get(ref, fetched.get(ref)) for ref in needed}
            yield pa.concat_tables([_piece(blocks[ref], lo, hi, epoch) for ref, lo, hi, epoch in runs])


class LoaderConfig(DataConfig):
    """Ray Train's hook: gives each rank of a new worker group a loader of one new coordinator."""

    def __init__(self, plan: LoadPlan) -> None:
        super().__init__()
        self._plan = plan

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, RankLoader]]:
        """One `RankLoader` named `train` per rank. The datasets that Ray Train passes are a placeholder."""
        del datasets
        coordinator = (
            ray.remote(BatchCoordinator)
            .options(num_cpus=0, max_concurrency=(FETCH_AHEAD + 2) * world_size + 2)
            .remote(self._plan, world_size)
        )
        return [{"train": RankLoader(coordinator, self._plan, rank, world_size)} for rank in range(world_size)]
