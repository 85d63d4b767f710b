"""Runs Ray Data in order, with bounded memory, and without dropping blocks. The only module that sets Ray Data's options."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, ExecutionOptions, ExecutionResources

T = TypeVar("T")

STORE_BYTES = 256 << 20  # object store limit of one execution
SEGMENT = 512  # items of one execution: Ray needs 0.6 ms per item to start one


def map_in_order(function: Callable[[T], bytes], items: Sequence[T]) -> Generator[bytes, None, None]:
    """Yields function(item) for each item, in the items' order, computed in parallel. Results must be small.

    Close the generator if an exception may abandon it (contextlib.closing): Ray Data prints a traceback if the garbage collector
    closes it after Ray has shut down.
    """
    for lo in range(0, len(items), SEGMENT):

        def run(item: T) -> pa.Table:
            return pa.table({"result": [function(item)]})

        dataset = open_dataset(run, items[lo : lo + SEGMENT])
        with closing(iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))) as batches:
            for batch in batches:
                yield from batch.column("result").to_pylist()


def open_dataset(function: Callable[[T], pa.Table], items: Sequence[T]) -> ray.data.Dataset:
    """A dataset with one block per item, function(item), in the items' order."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0  # a larger value drops blocks silently
    context.retried_map_errors = False  # storage retries transient errors; Ray's retry would wrap our messages
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(object_store_memory=STORE_BYTES)
    )
    rows = [{"place": i} for i in range(len(items))]
    reference = ray.put(list(items))

    def run(batch: dict[str, Any]) -> Iterator[pa.Table]:
        os.environ.setdefault("RAYON_NUM_THREADS", "1")  # tokenizers' threads: a task has one CPU
        for place in batch["place"]:
            yield function(ray.get(reference)[int(place)])

    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    return dataset.map_batches(run, batch_size=1, batch_format="numpy")
