"""Memory and waiting of the data engine: index a set, stream it, begin again deep inside.

    python -m bench.data_memory --mb 400

Generates JSONL shards, makes the index by the Ray Data pass, feeds one rank from the first step, and again from a step
nine tenths through. Samples, twice a second, of the driver, Ray's workers (each and in sum) and the object store; what
processes share, and mapped files, are left out. Told as the peak of each quarter of a phase, so that growth is seen.
Waiting is from asking for batches to having the first, with the worker pool that the phase before has left warm. One
JSON line a phase.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.internal_api import memory_summary

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.data_corpus import write_corpus  # noqa: E402
from ftray import config  # noqa: E402
from ftray.data.chunks import streams  # noqa: E402
from ftray.data.index import build_index  # noqa: E402
from ftray.data.loader import LoaderConfig, LoadPlan, make_plan  # noqa: E402
from ftray.model.load import load_tokenizer, tokenizer_hash  # noqa: E402

MB = 1 << 20


class Sampler:
    """Peaks of memory while it runs, in MB."""

    def __init__(self, every_s: float = 0.5) -> None:
        self._every_s, self.samples = every_s, list[dict[str, float]]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._every_s):
            self.samples.append(self._sample())

    def _sample(self) -> dict[str, float]:
        workers = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.name().startswith("ray::") or (process.cmdline() or [""])[0].startswith("ray::"):
                    memory = process.memory_info()
                    workers.append((memory.rss - memory.shared) / MB)
            except psutil.Error:
                continue
        driver = psutil.Process().memory_info()
        stored = re.search(
            r"Plasma memory usage (\d+) MiB", memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
        )
        return {
            "driver_mb": (driver.rss - driver.shared) / MB,
            "largest_worker_mb": max(workers, default=0.0),
            "all_workers_mb": sum(workers),
            "object_store_mb": float(stored.group(1)) if stored else 0.0,
        }

    def peaks(self) -> dict[str, list[int]]:
        """Peak of each quarter of the time."""
        size = max(1, len(self.samples) // 4)
        quarters = [part for part in (self.samples[i * size : (i + 1) * size] for i in range(4)) if part]
        names = self.samples[0] if self.samples else {}
        return {name: [round(max(s[name] for s in part)) for part in quarters] for name in names}


@contextmanager
def phase(name: str, found: dict[str, Any]) -> Iterator[None]:
    """Runs a phase under a sampler; prints what it found."""
    began = time.monotonic()
    with Sampler() as sampler:
        yield
    found |= {"phase": name, "seconds": round(time.monotonic() - began, 1), **sampler.peaks()}
    print(json.dumps({"phase": name, **found}), flush=True)


def feed(plan: LoadPlan, start: int, stop: int, found: dict[str, Any]) -> None:
    """Takes steps [start, stop) as one rank; notes how long the first took."""
    (shard,) = [named["train"] for named in LoaderConfig(plan).configure(None, 1)]
    began = time.monotonic()
    for batch in shard.batches(start):
        found.setdefault("first_batch_s", round(time.monotonic() - began, 2))
        found["steps"] = batch.step - start + 1
        if batch.step + 1 == stop:
            break
    found["rows_per_s"] = round(found["steps"] * plan.global_batch_size / (time.monotonic() - began))


def measure(directory: Path, base: config.ModelConfig, chunk_mb: float, batch: int, clean: str) -> list[dict[str, Any]]:
    """The three phases over a directory of shards. Needs a started Ray."""
    rules = dict.fromkeys(("duplicates", "near_duplicates", "contamination", "quality"), clean)
    data = config.DataConfig.model_validate(
        {
            "max_seq_len": 4096,
            "train": [{"path": str(directory)}],
            "chunk_mb": chunk_mb,
            "clean": rules,
        }
    )
    stream, _ = streams(data, partial(load_tokenizer, base))
    phases: list[dict[str, Any]] = [{}, {}, {}]
    with tempfile.TemporaryDirectory() as scratch, phase("index", phases[0]):
        index = build_index(stream, int(chunk_mb * 1e6), scratch, tokenizer_hash(load_tokenizer(base)))
        phases[0] |= {
            "chunks": len(index.facts),
            "tokens": index.total("num_tokens"),
            "rows": index.total("num_sequences"),
        }
    plan = make_plan(index, stream, 0, batch, 1, None)
    with phase("stream", phases[1]):
        feed(plan, 0, plan.num_steps, phases[1])
    with phase("resume", phases[2]):
        deep = plan.num_steps * 9 // 10
        feed(plan, deep, min(deep + 4, plan.num_steps), phases[2])
    return phases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=400)
    parser.add_argument("--chunk-mb", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--clean", default="off", choices=["off", "report"], help="all four rules of data.clean")
    parser.add_argument("--base", default="embedded:smollm2-135m-instruct")
    args = parser.parse_args()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_corpus(Path(scratch), args.mb, shard_mb=min(64, args.mb))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        measure(directory, config.ModelConfig(base=args.base), args.chunk_mb, args.batch, args.clean)
    return 0


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # Ray's workers too
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    raise SystemExit(main())
