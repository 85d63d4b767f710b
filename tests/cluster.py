"""One Ray for a test module, and runs of the tiny model on it through ftray's own driver."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from prometheus_client.parser import text_string_to_metric_families

from ftray import config, console, storage
from ftray.driver.launch import train
from ftray.driver.run_record import open_run
from ftray.events.bus import Subscriber
from ftray.train.checkpoint.catalog import CheckpointRef

DEADLINE_S = 300.0


@contextmanager
def local_ray(num_cpus: int = 4) -> Iterator[None]:
    """A Ray of its own, quiet."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


def make_run(directory: Path, model: Path, data: Path, **overrides: Any) -> config.RunConfig:
    """A small run: 2 workers, rows of 128 tokens, global batch 4, fp32. overrides: dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "storage": str(directory),
        "model": {"base": str(model)},
        "method": {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"max_seq_len": 128, "chunk_mb": 0.002, "train": [{"path": str(data)}]},
        "train": {"max_steps": 12, "global_batch_size": 4, "learning_rate": 5e-3, "precision": "fp32"},
        "deepspeed": {"zero_stage": 2},
        "scale": {"num_workers": 2},
        "checkpoint": {"every": 4, "keep": 9},
        "evaluate": {"metrics": ["loss", "rouge"], "num_generations": 4, "max_new_tokens": 12},
    }
    for key, value in overrides.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return config.parse_run(tree, "test")


class Watched(io.StringIO):
    """A stream for a Console that calls each `act` once, one after the other, when text that came since holds `until`."""

    def __init__(self, *script: tuple[str, Callable[[], None]]) -> None:
        super().__init__()
        self._script, self._seen = list(script), 0
        self.failed: list[BaseException] = []

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._script and self._script[0][0] in self.getvalue()[self._seen :]:
            (_, act), self._seen = self._script.pop(0), self.tell()
            threading.Thread(target=self._do, args=(act,), daemon=True).start()
        return written

    def _do(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as err:
            self.failed.append(err)
            raise


def run_training(
    run: config.RunConfig, *script: Any, parent: str | None = None, subscribers: Sequence[Subscriber] = ()
) -> tuple[CheckpointRef, str]:
    """Trains in this process; returns the last checkpoint and what the user saw.

    script: `until, act`, or one Watched. parent: the checkpoint that a new run starts from. subscribers: as in `train`.
    """
    stream = script[0] if script and isinstance(script[0], Watched) else Watched(*([script] if script else []))
    run_dir = open_run(run, parent)
    kept, console.PLAIN_EVERY_S = console.PLAIN_EVERY_S, 0.0
    try:
        found = train(run, run_dir, console.Console(stream), subscribers=subscribers)
    finally:
        console.PLAIN_EVERY_S = kept
        if stream.failed:  # the test could not do what it is about
            raise stream.failed[0]
    return found, stream.getvalue()


def press_ctrl_c() -> None:
    """What a terminal does to the foreground process."""
    os.kill(os.getpid(), signal.SIGINT)


def kill_a_worker() -> None:
    """SIGKILL to one training worker of this process's Ray."""
    workers = processes_of("RayTrainWorker")
    assert workers, "no training worker is running"
    workers[-1].kill()


@contextmanager
def slowed(title: str, stopped_s: float, goes_s: float) -> Iterator[Callable[[], None]]:
    """Gives what starts to hold up one process of this process's Ray, as other work on its machine would; to the end.

    title: a part of what Ray calls the process.
    """
    over = threading.Event()

    def slow() -> None:
        held = processes_of(title)[-1]
        with suppress(psutil.NoSuchProcess):
            while not over.is_set():
                held.suspend()
                over.wait(stopped_s)
                held.resume()
                over.wait(goes_s)

    try:
        yield slow
    finally:
        over.set()


def processes_of(title: str) -> list[psutil.Process]:
    """Those of this process's own Ray whose names hold `title`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.info["cmdline"] or []) and os.getpid() in [p.pid for p in process.parents()]:
                found.append(process)
    return found


def losses(run_dir: str) -> dict[int, float]:
    """Loss of each step in metrics.jsonl; fails if a step appears twice."""
    lines = [json.loads(line) for line in storage.read_bytes(f"{run_dir}/metrics.jsonl").splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"steps repeat or are out of order: {steps}"
    return {line["step"]: line["loss"] for line in lines}


def weights_hash(found: CheckpointRef) -> str:
    """sha256 over a checkpoint's tensors: weights and moments."""
    from ftray.train.checkpoint.writer import load_checkpoint

    digest = hashlib.sha256()
    for name, tensor in sorted(load_checkpoint(found).items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.1)


def restart_ray(num_cpus: int = 4) -> None:
    """A new Ray in place of this process's own; it takes over the environment as it is now."""
    ray.shutdown()
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="error")


def ray_metrics(prefix: str) -> dict[tuple[str, ...], float]:
    """Metrics of this node with that prefix, as Prometheus reads them: (name, "label=value" in order …) → value.

    Ray forgets a gauge some seconds after its last report, and a busy node exports megabytes: read all that a check
    compares at once, and parse nothing else.
    """
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith(prefix)]
    return {
        (sample.name, *sorted(f"{key}={value}" for key, value in sample.labels.items())): sample.value
        for family in text_string_to_metric_families("\n".join([*lines, ""]))
        for sample in family.samples
    }


def ray_metric(name: str, *labels: str) -> float | None:
    """The first series of that name with those labels ("run=tiny"); None if there is none yet."""
    try:
        series = ray_metrics(name)
    except OSError:  # nobody listens yet
        return None
    return next((value for (known, *has), value in series.items() if known == name and set(labels) <= set(has)), None)


def wait_for_metrics(prefix: str, label: str, is_complete: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Name without prefix → value of the series with that label ("run=tiny"), once one scrape has all of them."""
    values: dict[str, float] = {}

    def are_shown() -> bool:
        time.sleep(1)  # Ray's agent serves few scrapes a second
        with suppress(OSError):  # nobody listens yet
            values.clear()
            for (name, *labels), value in ray_metrics(prefix).items():
                if label in labels:
                    values[name.removeprefix(prefix)] = value
        return is_complete(values)

    wait_for(are_shown, f"Ray's metrics {prefix}*")
    return values
