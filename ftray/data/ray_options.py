"""How ftray runs Ray Data: in order, bounded, and without dropping anything. The only file that sets its options.

Knows Ray Data; nothing of what is mapped.
"""

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

STORE_BYTES = 256 << 20  # most that an execution keeps in the object store
SEGMENT = 512  # items of one execution: opening one takes Ray 0.6 ms an item before the first is worked on


def map_in_order(function: Callable[[T], bytes], items: Sequence[T]) -> Generator[bytes, None, None]:
    """function(item) for each item, in parallel, results in the items' order. Results are small.

    Close it where an exception may leave it half way (contextlib.closing): Ray Data's part, closed by the garbage
    collector after Ray's end, prints a traceback.
    """
    for lo in range(0, len(items), SEGMENT):

        def run(item: T) -> pa.Table:
            return pa.table({"result": [function(item)]})

        dataset = open_dataset(run, items[lo : lo + SEGMENT])
        with closing(iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))) as batches:
            for batch in batches:
                yield from batch.column("result").to_pylist()


def open_dataset(function: Callable[[T], pa.Table], items: Sequence[T]) -> ray.data.Dataset:
    """A dataset of one block for each item, function(item), kept in the items' order."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0  # anything above drops blocks in silence
    context.retried_map_errors = False  # storage retries what may pass; Ray's retry would add its words to our errors
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
