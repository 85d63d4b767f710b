"""TensorBoard, MLflow and Weights & Biases: told the committed timeline, the same lines that `metrics.jsonl` has.

What was told is derived from what a tracker holds, or kept beside it, so that a run that was killed goes on where its curve
ends: each step is there once. A thread of the driver tells them; a tracker that fails, or takes its time, holds up nothing.
Knows what storage says of a run; nothing of Ray, workers or models.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ftray import config, storage
from ftray.errors import ConfigError, Interrupted, Preempted
from ftray.redact import redacted
from ftray.train.checkpoint.catalog import Segment, read_segments

LIBRARIES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # tracker → module
SETTLE_S = 10.0  # from the news of a checkpoint to its commit, about
END_S = 60.0  # that trackers get when a command ends
HASTE_S = 5.0  # that they get when the machine goes away, or after a second Ctrl-C
MLFLOW_BATCH = 1000  # figures that a call may hold


class Tracker(Protocol):
    """One of them. Its methods may raise anything."""

    def tell(self, segments: list[Segment]) -> None:
        """Brings the tracker up to the committed timeline, which is told whole each time."""

    def close(self, state: str) -> None:
        """Nothing more comes from this command, which ended as FINISHED, KILLED (to be continued) or FAILED."""

    def abandon(self) -> None:
        """Called by another thread when there is no more time: nothing may outlive the command."""


def check_trackers(run: config.RunConfig) -> None:
    """Raises ConfigError for a tracker whose library is missing, or that has no place to write to."""
    for name in run.tracking.trackers:
        if importlib.util.find_spec(LIBRARIES[name]) is None:
            raise ConfigError(
                f"tracking.trackers has {name}, which needs a library: pip install 'ftray[{name}]', or remove it"
            )
        if name == "mlflow" and storage.is_remote(run.directory) and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                f"tracking.trackers has mlflow, which writes no files to {run.storage}; set MLFLOW_TRACKING_URI to a server "
                "or a directory, or remove it"
            )


@contextmanager
def tracked(
    run: config.RunConfig, run_dir: str, warn: Callable[[str], None], is_ours: Callable[[], bool] = lambda: True
) -> Iterator[Callable[[], None]]:
    """Tells the run's trackers while it trains, and at the end; gives what is to be called at each committed checkpoint.

    is_ours: whether the run is still this process's; if another has taken it over, nothing more is told.
    """
    tellers = [_TrackerThread(name, run, run_dir, warn, is_ours) for name in run.tracking.trackers]
    for teller in tellers:
        teller.start()
    limit_s, state = END_S, "FAILED"

    def tell_news() -> None:
        for teller in tellers:
            teller.news.set()

    try:
        yield tell_news
        state = "FINISHED"
    except (Preempted, Interrupted, KeyboardInterrupt):
        limit_s, state = HASTE_S, "KILLED"
        raise
    finally:
        end_s = time.monotonic() + limit_s
        for teller in tellers:
            teller.state = state
            teller.ended.set()
        tell_news()
        for teller in tellers:
            teller.join(max(0.0, end_s - time.monotonic()))
            if teller.is_alive():
                warn(f"{teller.name} is not done after {limit_s:.0f} s; its curve may lack the last steps")
                teller.leave()


class _TrackerThread(threading.Thread):
    """Tells one tracker when there is news. A failure is told once; the next checkpoint is another try."""

    def __init__(
        self, name: str, run: config.RunConfig, run_dir: str, warn: Callable[[str], None], is_ours: Callable[[], bool]
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._run, self._run_dir, self._is_ours = run, run_dir, is_ours
        self._warn: Callable[[str], None] | None = warn
        self._tracker: Tracker | None = None
        self.news, self.ended, self.state = threading.Event(), threading.Event(), ""

    def leave(self) -> None:
        """There is no more time."""
        self._warn = None
        if self._tracker is not None:
            self._tracker.abandon()

    def run(self) -> None:
        """Until the end."""
        kept: dict[str, Segment] = {}
        last = False
        while not last:
            self.news.wait()
            self.news.clear()
            last = self.ended.wait(SETTLE_S)
            if not self._is_ours():
                return
            try:
                if self._tracker is None:
                    self._tracker = TRACKERS[self.name](self._run, self._run_dir)
                self._tracker.tell(read_segments(self._run_dir, kept))
                if last:
                    self._tracker.close(self.state)
            except Exception as err:  # noqa: BLE001 - whatever a library raises, the run goes on
                if self._tracker is not None:
                    self._tracker.abandon()
                self._tracker = None
                if self._warn is not None:
                    text = redacted(" ".join(str(err).split())[:200])
                    self._warn(
                        f"{self.name} can't be told ({type(err).__name__}: {text}); the run goes on, metrics.jsonl has all of "
                        "it, and the tracker gets what it lacks at a later checkpoint, or when the run is continued"
                    )
                    self._warn = None


class TensorBoard:
    """One event file for each committed segment, below `<run>/tensorboard/`, in the run's storage wherever that is.

    A file's name tells its steps and contents. What is there is not written again, and what the committed timeline has
    left behind goes.
    """

    def __init__(self, _: config.RunConfig, run_dir: str) -> None:
        self._place = storage.join(run_dir, "tensorboard")
        found = storage.list_files(self._place)
        self._there = {file.path: file.uri for file in found if _EVENTS.fullmatch(file.path)}  # others are a user's

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

    def close(self, state: str) -> None:
        pass

    def abandon(self) -> None:
        pass


_EVENTS = re.compile(r"events\.out\.tfevents\.\d{8}-\d{8}-[0-9a-f]{8}")


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

    def __init__(self, run: config.RunConfig, run_dir: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(run_dir, "mlflow").as_uri()
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ftray")
        experiment, mark = self._experiment(name), _id(run_dir)
        runs = self._client.search_runs([experiment], f"tags.`ftray.run` = '{mark}'")
        if runs:
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {"ftray.run": mark, "mlflow.runName": run.name, "ftray.config_hash": run.config_hash}
            self._run_id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        # By figure: a command that was killed may have told a part of a step.
        self._last = {key: self._newest(key) for key in self._client.get_run(self._run_id).data.metrics}

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another trial of a sweep was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

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

    def close(self, state: str) -> None:
        self._client.set_terminated(self._run_id, state)

    def abandon(self) -> None:
        pass


class Wandb:
    """A run of Weights & Biases, named by ftray's: online where WANDB_MODE or a WANDB_API_KEY says so, else offline.

    A process of its own talks to W&B (`wandb_process`): its library keeps a process alive that can't be told what it still
    has to send. Offline it is written as a command ends: what W&B has not flushed is lost in a kill, and nobody watches. The
    files lie in WANDB_DIR, else in `<run>/wandb/` (of a run in S3: in ftray's cache on the driver's machine), once they are
    whole; how far they are is in `<run>/trackers/wandb.json`. Online, W&B says it.
    """

    def __init__(self, run: config.RunConfig, run_dir: str) -> None:
        self._told = storage.join(run_dir, "trackers", "wandb.json")
        local = storage.cache_directory() / "wandb" / run.name if storage.is_remote(run_dir) else Path(run_dir)
        self._place = Path(os.environ.get("WANDB_DIR") or local)
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._is_online = mode == "online"
        self._settings = {"name": run.name, "id": _id(run_dir), "config_hash": run.config_hash, "mode": mode}
        self._lines: list[dict[str, Any]] = []
        self._process: subprocess.Popen[str] | None = None
        self._last = -1 if self._is_online else _told_step(self._told)

    def _open(self, place: Path) -> int:
        """Starts the process; returns the last step that W&B has."""
        place.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(  # nosec B603 # a list of words, no shell
            [sys.executable, "-m", "ftray.driver.wandb_process", json.dumps({**self._settings, "dir": str(place)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for ftray
        )
        return int(self._answer()["last"])

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def tell(self, segments: list[Segment]) -> None:
        if self._is_online and self._process is None:
            self._last = self._open(self._place)
        self._lines = [line for line in itertools.chain.from_iterable(segments) if line["step"] > self._last]
        if self._is_online:
            self._log()

    def _log(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        for line in self._lines:
            told = {"step": line["step"], "figures": figures(line) | {"unix_s": line["unix_s"]}}
            self._process.stdin.write(json.dumps(told) + "\n")
            self._last = int(line["step"])
        self._process.stdin.flush()

    def close(self, state: str) -> None:
        if self._is_online:
            self._end(state)
        elif self._lines:
            unfinished = self._place / ".unfinished-wandb"  # of a command that was killed, if it is there
            shutil.rmtree(unfinished, ignore_errors=True)
            self._open(unfinished)
            self._log()
            self._end(state)
            (self._place / "wandb").mkdir(exist_ok=True)
            for made in (unfinished / "wandb").glob("offline-run-*"):
                made.rename(self._place / "wandb" / made.name)
            storage.write_bytes(self._told, json.dumps({"step": self._last}).encode())
            shutil.rmtree(unfinished, ignore_errors=True)

    def _end(self, state: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"state": state}) + "\n")
        self._process.stdin.close()
        self._answer()
        self._process.wait()
        self._process = None

    def abandon(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


TRACKERS: dict[str, Callable[[config.RunConfig, str], Tracker]] = {
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


def _told_step(uri: str) -> int:
    """The last step that W&B was told offline; -1, so that all are told again, where that is not known."""
    try:
        step = (storage.find_object(uri) or {}).get("step")
    except storage.DamagedFile:
        return -1
    return step if isinstance(step, int) else -1


def _id(run_dir: str) -> str:
    """Names a run for trackers, wherever it is continued; one that is deleted and begun anew has another name.

    A damaged name is replaced: trackers then show a second run.
    """
    place = storage.join(run_dir, "trackers", "id")
    if not storage.exists(place):
        storage.create_bytes(place, uuid.uuid4().hex[:16].encode())
    name = storage.read_bytes(place).decode(errors="replace")
    if not re.fullmatch(r"[0-9a-f]{16}", name):
        name = uuid.uuid4().hex[:16]
        storage.write_bytes(place, name.encode())
    return name
