"""The order of rows two ways: a plain replay of the rules in this process, and what the Ray pipeline hands to ranks.

Used by tests and by bench/order_proof.py.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ftray import config
from ftray.console import Console
from ftray.data.checks.findings import DataFinding
from ftray.data.chunks import pack_chunk
from ftray.data.index import Index
from ftray.data.loader import LoadPlan
from ftray.data.order import chunk_order, sequence_order
from ftray.data.prepare import prepare_data
from ftray.data.verify import trace_order
from ftray.model.load import load_tokenizer, tokenizer_hash
from tests import cluster, tiny

Row = tuple[Any, ...]  # (source, epoch, chunk, row, sha256)


def save_tokenizer(directory: Path) -> Path:
    """A directory that serves as `model.base` where only the tokenizer is needed."""
    tiny.make_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "model.safetensors").touch()
    return directory


def make_plan(directory: Path, base: Path, sources: list[dict[str, Any]], **overrides: Any) -> LoadPlan:
    """Index and plan of a run over these sources. Needs Ray."""
    run: config.RunConfig = cluster.make_run(directory, base, Path("/"), data__train=sources, **overrides)
    load = partial(load_tokenizer, run.model)
    directory.mkdir(parents=True, exist_ok=True)
    return prepare_data(run, str(directory / run.name), Console(io.StringIO()), load, tokenizer_hash(load())).plan


def read_findings(index: Index, directory: str) -> list[DataFinding]:
    """The findings file of an index."""
    lines = (Path(directory) / index.findings).read_text().splitlines() if index.findings else []
    names = [f.name for f in fields(DataFinding)]
    return [DataFinding(**{name: json.loads(line)[name] for name in names}) for line in lines]


def replay(plan: LoadPlan) -> Iterator[tuple[Row, list[tuple[str, int]]]]:
    """Row after row of the run with its records, by the rules of `order` alone: no Ray, no cursors, no stops."""
    streams = [_replay_source(plan, source) for source in range(len(plan.sources))]
    for source in plan.mixture.sources(0):
        yield next(streams[source])


def _replay_source(plan: LoadPlan, source: int) -> Iterator[tuple[Row, list[tuple[str, int]]]]:
    packed = [pack_chunk(f.chunk, plan.stream) for f in plan.sources[source]]
    keys = [(f.chunk.path, f.chunk.start) for f in plan.sources[source]]
    epoch = 0
    while True:
        for number in chunk_order(keys, plan.seed, epoch, source):
            found, (path, start) = packed[number], keys[number]
            for at in sequence_order(len(found.sequences), plan.seed, epoch, source, path, start):
                row = found.sequences[at]
                digest = hashlib.sha256(row.input_ids.tobytes() + row.labels.tobytes()).hexdigest()
                chunk = plan.sources[source][number].chunk
                places = [chunk.locate(found.examples[found.owners[d]].position) for d in row.documents]
                records = [(piece.path, position) for piece, position in places]
                yield (source, epoch, number, at, digest), records
        epoch += 1


def expected_steps(plan: LoadPlan) -> list[list[Row]]:
    """Rows of each step of the run, by replay."""
    rows = (row for row, _ in replay(plan))
    return [list(islice(rows, plan.global_batch_size)) for _ in range(plan.num_steps)]


def fed_steps(plan: LoadPlan, world_size: int, start: int = 0, end: int | None = None) -> dict[int, list[Row]]:
    """Rows of each step as the Ray pipeline gives them to the ranks, rank after rank, when the feed starts at `start`."""
    steps: dict[int, list[Row]] = {}
    last = plan.num_steps if end is None else end
    for entry in trace_order(plan, world_size, start, start, last):
        assert len(entry["sequences"]) == plan.global_batch_size // world_size
        steps.setdefault(entry["step"], []).extend(tuple(row) for row in entry["sequences"])
    return steps
