"""TensorBoard, MLflow and Weights & Biases: told the committed timeline, the same lines that `metrics.jsonl` has.

What was told is derived from what a tracker holds, or kept beside it, so that a run that was killed goes on where its curve
ends: each step is there once. A thread of the driver tells them; a tracker that fails, or takes its time, holds up nothing.
Knows what storage says of a run; nothing of Ray, workers or models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ftray import config, storage
from ftray.errors import ConfigError, Preempted
from ftray.redact import redacted
from ftray.train.timeline import Segment, read_segments

LIBRARIES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # tracker → module
SETTLE_S = 10.0  # from the news of a checkpoint to its commit, about
END_S = 60.0  # that trackers get when a command ends
HASTE_S = 5.0  # that they get when the machine goes away, or after a second Ctrl-C
MLFLOW_BATCH = 1000  # figures that a call may hold


class Tracker(Protocol):
    """One of them. Both methods may raise anything."""

    def tell(self, segments: list[Segment]) -> None:
        """Brings the tracker up to the committed timeline, which is told whole each time."""

    def close(self) -> None:
        """Nothing more comes from this process."""


def check_trackers(run: config.Run) -> None:
    """Raises ConfigError for a tracker whose library is missing, or that has no place to write to."""
    for name in run.observe.trackers:
        if importlib.util.find_spec(LIBRARIES[name]) is None:
            raise ConfigError(
                f"observe.trackers has {name}, which needs a library: pip install 'ftray[{name}]', or remove it"
            )
        if name == "mlflow" and storage.is_remote(run.directory) and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                f"observe.trackers has mlflow, which writes no files to {run.storage}; set MLFLOW_TRACKING_URI to a server "
                "or a directory, or remove it"
            )


@contextmanager
def tracked(run: config.Run, run_dir: str, warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Tells the run's trackers while it trains, and at the end; gives what is to be called at each committed checkpoint."""
    tellers = [_Teller(name, run, run_dir, warn) for name in run.observe.trackers]
    for teller in tellers:
        teller.start()
    limit_s = END_S

    def tell_news() -> None:
        for teller in tellers:
            teller.news.set()

    try:
        yield tell_news
    except (Preempted, KeyboardInterrupt):
        limit_s = HASTE_S
        raise
    finally:
        end_s = time.monotonic() + limit_s
        for teller in tellers:
            teller.ended.set()
        tell_news()
        for teller in tellers:
            teller.join(max(0.0, end_s - time.monotonic()))
            if teller.is_alive():
                warn(f"{teller.name} is not done after {limit_s:.0f} s; its curve may lack the last steps")
                teller.warn = None


class _Teller(threading.Thread):
    """Tells one tracker when there is news; after a failure says so once, and tells it no more."""

    def __init__(self, name: str, run: config.Run, run_dir: str, warn: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._run, self._run_dir = run, run_dir
        self.warn: Callable[[str], None] | None = warn
        self.news, self.ended = threading.Event(), threading.Event()

    def run(self) -> None:
        """Until the end."""
        kept: dict[str, Segment] = {}
        try:
            tracker = TRACKERS[self.name](self._run, self._run_dir)
            while True:
                self.news.wait()
                self.news.clear()
                last = self.ended.wait(SETTLE_S)
                tracker.tell(read_segments(self._run_dir, kept))
                if last:
                    tracker.close()
                    return
        except Exception as err:  # noqa: BLE001 - whatever a library raises, the run goes on
            if self.warn is not None:
                text = redacted(" ".join(str(err).split())[:200])
                self.warn(
                    f"{self.name} is told no more ({type(err).__name__}: {text}); the run goes on, metrics.jsonl has all "
                    "of it, and the tracker what it lacks when the run is continued"
                )


class TensorBoard:
    """One event file for each committed segment, below `<run>/tensorboard/`, in the run's storage wherever that is.

    A file's name tells its steps and contents. What is there is not written again, and what the committed timeline has
    left behind goes.
    """

    def __init__(self, _: config.Run, run_dir: str) -> None:
        self._place = storage.join(run_dir, "tensorboard")
        self._there = {file.path: file.uri for file in storage.list_files(self._place)}

    def tell(self, segments: list[Segment]) -> None:
        wanted = {}
        for lines in segments:
            mark = zlib.crc32(json.dumps(lines).encode())
            wanted[f"events.out.tfevents.{lines[0]['step']:08d}-{lines[-1]['step']:08d}-{mark:08x}"] = lines
        for name in self._there.keys() - wanted.keys():
            storage.delete(self._there.pop(name))
        for name in wanted.keys() - self._there.keys():
            uri = storage.join(self._place, name)
            storage.write_bytes(uri, _events(wanted[name]))
            self._there[name] = uri

    def close(self) -> None:
        pass


def _events(lines: Segment) -> bytes:
    """An event file's bytes: one event a step, with all of its figures."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        path = Path(scratch, "events")
        writer = RecordWriter(str(path))
        writer.write(Event(wall_time=lines[0]["unix_s"], file_version="brain.Event:2").SerializeToString())
        for line in lines:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures(line).items()]
            event = Event(wall_time=line["unix_s"], step=line["step"], summary=Summary(value=values))
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()


class MLflow:
    """A run of the server or store in MLFLOW_TRACKING_URI, else of a file store in `<run>/mlflow/`."""

    def __init__(self, run: config.Run, run_dir: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(run_dir, "mlflow").as_uri()
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ftray")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`ftray.run` = '{_id(run_dir)}'")
        if runs:
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {"ftray.run": _id(run_dir), "mlflow.runName": run.name, "ftray.config_hash": run.config_hash}
            self._run_id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        # By figure: a command that was killed may have told a part of a step.
        self._last = {key: self._newest(key) for key in self._client.get_run(self._run_id).data.metrics}

    def _newest(self, key: str) -> int:
        return max(metric.step for metric in self._client.get_metric_history(self._run_id, key))

    def tell(self, segments: list[Segment]) -> None:
        from mlflow.entities import Metric

        told = dict(self._last)
        new = [
            Metric(key, value, int(line["unix_s"] * 1000), int(line["step"]))
            for line in itertools.chain.from_iterable(segments)
            for key, value in figures(line).items()
            if line["step"] > told.get(key, -1)
        ]
        for first in range(0, len(new), MLFLOW_BATCH):
            self._client.log_batch(self._run_id, metrics=new[first : first + MLFLOW_BATCH])
        self._last = told | {metric.key: metric.step for metric in new}

    def close(self) -> None:
        self._client.set_terminated(self._run_id, "FINISHED")


class Wandb:
    """A run of Weights & Biases, named by ftray's: online where WANDB_MODE or a WANDB_API_KEY says so, else offline.

    Offline it is written as a command ends: what W&B has not flushed is lost in a kill, and nobody watches. The files lie
    in WANDB_DIR, else in `<run>/wandb/` (of a run in S3: in ftray's cache on the driver's machine), and how far they are
    in `<run>/trackers/wandb.json`; online, W&B says it.
    """

    def __init__(self, run: config.Run, run_dir: str) -> None:
        self._name, self._id, self._hash = run.name, _id(run_dir), run.config_hash
        self._told = storage.join(run_dir, "trackers", "wandb.json")
        local = storage.cache_directory() / "wandb" / run.name if storage.is_remote(run_dir) else Path(run_dir)
        self._place = Path(os.environ.get("WANDB_DIR") or local)
        self._mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._lines: list[dict[str, Any]] = []
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._run = self._open() if self._mode == "online" else None
        if self._run is not None:
            self._last = int(self._run.starting_step) - 1
        else:
            self._last = json.loads(storage.read_bytes(self._told))["step"] if storage.exists(self._told) else -1

    def _open(self) -> Any:
        import wandb

        self._place.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ftray"),
            name=self._name,
            id=self._id,
            resume="allow" if self._mode == "online" else None,
            dir=str(self._place),
            mode=self._mode,
            reinit="create_new",  # trials of a sweep are told side by side
            config={"config_hash": self._hash},
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
            ),
        )

    def tell(self, segments: list[Segment]) -> None:
        self._lines = [line for line in itertools.chain.from_iterable(segments) if line["step"] > self._last]
        if self._run is not None:
            self._log(self._run)

    def _log(self, run: Any) -> None:
        for line in self._lines:
            run.log(figures(line) | {"unix_s": line["unix_s"]}, step=int(line["step"]), commit=True)
            self._last = int(line["step"])

    def close(self) -> None:
        if self._run is None and not self._lines:
            return
        run = self._run or self._open()
        if self._run is None:
            self._log(run)
        run.finish()
        if self._run is None:
            storage.write_bytes(self._told, json.dumps({"step": self._last}).encode())


TRACKERS: dict[str, Callable[[config.Run, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
}


def figures(line: dict[str, Any]) -> dict[str, float]:
    """What a line of metrics tells in numbers, by name; what was not finite is left out."""
    return {
        key: float(value)
        for key, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in ("step", "unix_s")
    }


def _id(run_dir: str) -> str:
    """Names a run for trackers, wherever it is continued."""
    return hashlib.sha256(run_dir.encode()).hexdigest()[:16]
