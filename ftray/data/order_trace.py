"""The order of rows as the real feed gives it: which rank takes which rows of which records at which step.

The same coordinator and shards as in training, with ranks that only write down what they are given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray

from ftray.data.loader import LoaderConfig, LoadPlan, RankLoader


def trace_order(plan: LoadPlan, world_size: int, start_step: int, first: int, end: int) -> Iterator[dict[str, Any]]:
    """One entry for each step of [first, end) and rank: step, rank, rows, records.

    rows: [source, epoch, chunk, row, sha256 of the row's input_ids and labels (int32, little-endian)]. records: [path
    relative to the source, byte offset or number in the file] of every record in these rows, row by row. start_step:
    where the feed is started, as after a checkpoint of that step. Needs a started Ray.
    """
    short = replace(plan, num_steps=min(end, plan.num_steps))
    shards = [named["train"] for named in LoaderConfig(short).configure(None, world_size)]
    ranks = [ray.remote(_TracingRank).options(num_cpus=0).remote(shard, start_step) for shard in shards]
    try:
        for step in range(start_step, short.num_steps):
            for rank, entry in enumerate(ray.get([r.next.remote() for r in ranks])):
                if step >= first:
                    yield {"step": step, "rank": rank, **entry}
    finally:
        for handle in ranks:
            ray.kill(handle)


class _TracingRank:
    """A rank that looks at its rows and forgets them."""

    def __init__(self, shard: RankLoader, start_step: int) -> None:
        self._plan, self._tables = shard.plan, shard.tables(start_step)

    def next(self) -> dict[str, Any]:
        table = next(self._tables)
        ids, labels = (table.column(name).combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels"))
        length = self._plan.stream.max_seq_len
        rows, records = [], []
        for place, row in enumerate(table.select(["source", "epoch", "chunk", "row", "records"]).to_pylist()):
            at = slice(place * length, (place + 1) * length)
            digest = hashlib.sha256(ids[at].tobytes() + labels[at].tobytes()).hexdigest()
            rows.append([row["source"], row["epoch"], row["chunk"], row["row"], digest])
            path = self._plan.sources[row["source"]][row["chunk"]].chunk.path
            records += [[path, position] for position in row["records"]]
        return {"rows": rows, "records": records}


def as_line(entry: dict[str, Any]) -> str:
    """An entry as one line of JSON."""
    return json.dumps(entry, ensure_ascii=False)


def as_text(entry: dict[str, Any]) -> str:
    """An entry as one line for people."""
    rows = ", ".join(f"{s}.{e}.{c}.{r} ({digest[:8]})" for s, e, c, r, digest in entry["rows"])
    records = ", ".join(f"{path}@{position}" for path, position in entry["records"])
    return f"step {entry['step']} rank {entry['rank']}: rows source.epoch.chunk.row {rows}; records {records}"
