"""Tokens per CPU-second from files to Arrow rows: ftray against what one writes by hand with Ray Data (issue 3).

    python -m bench.data_speed --mb 20

Both read the same shards, render the model's template, tokenize, mask, pack with the same best fit into rows of 4096
and give Arrow tables through Ray Data, in one run; their rows must be equal, id for id and label for label. The plain
way calls `tokenizer.apply_chat_template` of transformers for each record (and once more for the prompt, whose length
the mask needs) and builds rows as lists. CPU seconds are those of the process while it works on a task, threads
included, after the tokenizer was loaded. Reading counts for ftray only: the plain way's is Ray's own. Prints one JSON
line; exit code 1 if rows differ.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.data_corpus import write_corpus  # noqa: E402
from ftray import config  # noqa: E402
from ftray.data import chunks  # noqa: E402
from ftray.data.chunks import DatasetSpec, pack_chunk  # noqa: E402
from ftray.data.index import ChunkFacts  # noqa: E402
from ftray.data.loader import sequence_table  # noqa: E402
from ftray.data.packing import IGNORE_INDEX, best_fit  # noqa: E402
from ftray.data.ray_options import open_dataset  # noqa: E402
from ftray.data.sources import cut_shard, list_shards  # noqa: E402
from ftray.data.tokenizer import TokenizerLoader  # noqa: E402
from ftray.model.load import load_tokenizer  # noqa: E402

SEQ_LEN = 4096
COLUMNS = ("input_ids", "labels", "position_ids")


def rows_by_ftray(stream: DatasetSpec) -> pa.Table:
    """All rows in packing order. cpu_s: seconds of the task, in each of its rows."""
    cut = [c for shard in list_shards(stream.sources[0].path) for c in cut_shard(shard, 0, 4_000_000)]
    items = [(i, 0, ChunkFacts(c, 0, 0, 0, 0, pack_chunk(c, stream).digest)) for i, c in enumerate(cut)]

    def run(item: tuple[int, int, ChunkFacts]) -> pa.Table:
        chat, _ = chunks._tokenizer(stream.load_tokenizer, stream.train_on)
        chat.encode_examples(["a"])  # so that the engine is open
        began = time.process_time()
        table = sequence_table(item, stream, None)
        return table.append_column("cpu_s", pa.array([time.process_time() - began] * len(table)))

    return pa.concat_tables(open_dataset(run, items).iter_batches(batch_size=None, batch_format="pyarrow"))


class PlainRows:
    """What one writes by hand. A batch is a shard, so that both ways pack the same records together."""

    def __init__(self, base: config.ModelConfig, with_masks: bool) -> None:
        self._base, self._with_masks = base, with_masks

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        tokenizer = _plain_tokenizer(self._base)
        began = time.process_time()
        end = tokenizer.eos_token_id
        examples = []
        for raw in batch["messages"]:
            messages = [dict(turn) for turn in raw]
            ids = tokenizer.apply_chat_template(messages)["input_ids"]
            if len(ids) > SEQ_LEN:
                continue  # as ftray, which tells it too
            learned = range(len(ids))
            if self._with_masks:
                prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
                learned = range(len(prompt), len(ids) - ids[::-1].index(end))
            labels = [ids[t + 1] if t + 1 in learned else IGNORE_INDEX for t in range(len(ids) - 1)]
            examples.append((ids, [*labels, IGNORE_INDEX]))
        rows: dict[str, list[list[int]]] = {name: [] for name in COLUMNS}
        pad = tokenizer.pad_token_id
        for places in best_fit([len(ids) for ids, _ in examples], SEQ_LEN):
            lists: list[list[int]] = [[], [], []]
            for i in places:
                ids, labels = examples[i]
                for built, new in zip(lists, (ids, labels, range(len(ids))), strict=True):
                    built += new
            room = SEQ_LEN - len(lists[0])
            for name, built, new in zip(
                COLUMNS, lists, ([pad] * room, [IGNORE_INDEX] * room, range(room)), strict=True
            ):
                rows[name].append(built + list(new))
        table = pa.table({name: pa.array(rows[name], pa.list_(pa.int32(), SEQ_LEN)) for name in COLUMNS})
        return table.append_column("cpu_s", pa.array([time.process_time() - began] * len(table)))


@lru_cache(maxsize=1)
def _plain_tokenizer(base: config.ModelConfig) -> Any:
    return load_tokenizer(base)


def rows_by_hand(directory: Path, base: config.ModelConfig, with_masks: bool) -> pa.Table:
    """All rows in the shards' order."""
    files = sorted(str(path) for path in directory.glob("*.jsonl"))
    tables = []
    for file in files:  # one after the other: Ray may cut and join what it reads from several files
        dataset = ray.data.read_json(file, override_num_blocks=1)
        dataset = dataset.map_batches(PlainRows(base, with_masks), batch_size=None, batch_format="numpy")
        tables += list(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    return pa.concat_tables(tables)


def cpu_seconds(table: pa.Table) -> float:
    """Sum over tasks: each has its seconds in each of its rows, and no two tasks have the same."""
    return float(sum(set(table.column("cpu_s").to_pylist())))


def matrix(table: pa.Table, name: str) -> np.ndarray:
    """int32 [rows, SEQ_LEN]"""
    return np.asarray(table.column(name).combine_chunks().flatten()).reshape(-1, SEQ_LEN)


def measure(directory: Path, base: config.ModelConfig) -> dict[str, Any]:
    """Both ways over the shards of a directory. Needs a started Ray."""
    stream = DatasetSpec(
        (config.SourceConfig(path=str(directory)),),
        SEQ_LEN,
        True,
        None,
        None,
        TokenizerLoader(partial(load_tokenizer, base)),
    )
    ours = rows_by_ftray(stream)
    plain = rows_by_hand(directory, base, with_masks=True)
    bare = rows_by_hand(directory, base, with_masks=False)
    num_tokens = sum(ours.column("num_tokens").to_pylist())
    speeds = [num_tokens / cpu_seconds(table) for table in (ours, plain, bare)]
    chat, _ = chunks._tokenizer(stream.load_tokenizer, stream.train_on)
    return {
        "equal": all(np.array_equal(matrix(ours, name), matrix(plain, name)) for name in COLUMNS),
        "engine": getattr(chat._encode_batch, "engine", "transformers"),
        "num_tokens": num_tokens,
        "num_rows": len(ours),
        "fill": round(num_tokens / len(ours) / SEQ_LEN, 4),
        "ftray_tokens_per_cpu_s": round(speeds[0]),
        "plain_tokens_per_cpu_s": round(speeds[1]),
        "plain_without_masks_tokens_per_cpu_s": round(speeds[2]),
        "ratio": round(speeds[0] / speeds[1], 1),
        "ratio_to_plain_without_masks": round(speeds[0] / speeds[2], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--base", default="embedded:smollm2-135m-instruct")
    args = parser.parse_args()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(write_corpus(Path(scratch), args.mb), config.ModelConfig(base=args.base))
    print(json.dumps({"mb": args.mb, **found}))
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # Ray's workers too
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from bench import data_speed  # what Ray's workers import, unlike __main__

    raise SystemExit(data_speed.main())
