"""Trackers are told what metrics.jsonl has: each read back by its own reader, also after a command that was killed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftray import config, storage
from ftray.errors import ConfigError
from ftray.events import trackers
from ftray.train.checkpoint.catalog import RunProgress, merge_metrics, read_segments
from tests.runs import SETTINGS, line

Curve = list[tuple[int, float]]
KILLED = """
import os, signal, sys
from ftray import config
from ftray.train.checkpoint.catalog import read_segments
from ftray.events.trackers import TRACKERS, Wandb
run = config.load_run(sys.argv[1])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Wandb._end = die  # all is written, nothing finished
tracker = TRACKERS[run.tracking.trackers[0]](run, sys.argv[2])
tracker.update(read_segments(sys.argv[2], {}))
if isinstance(tracker, Wandb):
    tracker.close("KILLED")
die()
"""
DEAF = """
import sys
from ftray import config
from ftray.events import trackers
from ftray.train.checkpoint.catalog import read_segments
trackers.COMMIT_S, trackers.END_S = 0.0, 3.0
with trackers.follow_run(config.load_run(sys.argv[1]), sys.argv[2], read_segments, print) as committed:
    committed()
"""


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(trackers, "COMMIT_S", 0.0)


def make(tmp_path: Path, *names: str, **changes: Any) -> tuple[config.RunConfig, Path]:
    """A run with these trackers, its file beside it, without a checkpoint."""
    data = {"train": [{"path": "data"}]}
    tree = {**SETTINGS, "storage": str(tmp_path / "runs"), "data": data, "evaluate": {}, **changes}
    (tmp_path / "run.yaml").write_text(json.dumps({**tree, "tracking": {"trackers": list(names)}}))
    return config.load_run(tmp_path / "run.yaml"), tmp_path / "runs" / tree["name"]


def commit(run_dir: Path, segments: list[str], lines: list[dict[str, Any]]) -> RunProgress:
    """A checkpoint behind these lines; segments: those before it."""
    name = f"{lines[0]['step']:08d}-{lines[-1]['step']:08d}.jsonl"
    (run_dir / "metrics").mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics" / name).write_text("".join(json.dumps(each) + "\n" for each in lines))
    progress = RunProgress(step=lines[-1]["step"] + 1, segments=[*segments, name])
    storage.commit_files(str(run_dir / f"checkpoints/step-{progress.step:06d}"), {}, {"progress": asdict(progress)})
    return progress


def lines_of(first: int, end: int, factor: float = 1.0) -> list[dict[str, Any]]:
    """Metrics of steps first … end - 1, held-out losses among them; the loss of step 7 was not finite."""
    found = [line(n, factor * 3.0 * 0.97**n, 1_800_000_000.0 + n, sequences="ab") for n in range(first, end)]
    found = [each | ({"eval_loss": 2.9 * 0.97 ** each["step"]} if each["step"] % 5 == 4 else {}) for each in found]
    return [each | ({"loss": None, "skipped": True} if each["step"] == 7 else {}) for each in found]


def read_tensorboard(run_dir: Path, figure: str) -> Curve:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in found.Scalars(figure)]


def read_mlflow(run_dir: Path, figure: str) -> Curve:
    client = pytest.importorskip("mlflow.tracking").MlflowClient(tracking_uri=(run_dir / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("ftray")
    (run,) = client.search_runs([experiment.experiment_id])
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, figure)]


def read_wandb(run_dir: Path, figure: str) -> Curve:
    """All offline files of one run, in the order in which `wandb sync` takes them."""
    datastore = pytest.importorskip("wandb.sdk.internal.datastore")
    from wandb.proto.wandb_internal_pb2 import Record

    curve, ids = [], set()
    for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        ids.add(file.stem)
        store = datastore.DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if figure in items:
                curve.append((items["_step"], items[figure]))
    assert len(ids) == 1
    return curve


READERS: dict[str, Callable[[Path, str], Curve]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
}


def curve_of_the_run(run_dir: Path, figure: str, name: str) -> Curve:
    """What metrics.jsonl has; TensorBoard keeps 32 bits."""
    found = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in found] == list(range(len(found)))
    kept = float if name != "tensorboard" else np.float32
    return [(each["step"], float(kept(each[figure]))) for each in found if each.get(figure) is not None]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_the_curve_is_that_of_the_metrics_also_after_a_kill(name: str, tmp_path: Path) -> None:
    pytest.importorskip(trackers.LIBRARIES[name])
    run, run_dir = make(tmp_path, name)
    told: list[str] = []
    first = commit(run_dir, [], lines_of(0, 10))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run.yaml"), str(run_dir)])
    assert killed.returncode == -9
    second = commit(run_dir, first.segments, lines_of(10, 20))
    with trackers.follow_run(run, str(run_dir), read_segments, told.append) as committed:
        committed()
        last = commit(run_dir, second.segments, lines_of(20, 30))
    assert told == []
    assert merge_metrics(str(run_dir), last) == 30
    for figure in ("loss", "eval_loss", "num_tokens", "learning_rate"):
        assert READERS[name](run_dir, figure) == curve_of_the_run(run_dir, figure, name), figure
    assert [len(READERS[name](run_dir, figure)) for figure in ("loss", "eval_loss")] == [29, 6]
    last = commit(run_dir, last.segments, lines_of(30, 33))
    for _ in range(2):  # the run is continued; and once more, with nothing to do
        with trackers.follow_run(run, str(run_dir), read_segments, told.append):
            pass
    merge_metrics(str(run_dir), last)
    assert READERS[name](run_dir, "loss") == curve_of_the_run(run_dir, "loss", name)


def test_a_run_that_is_deleted_and_begun_anew_is_another_one_in_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    run, run_dir = make(tmp_path, "mlflow")
    store = (tmp_path / "server").as_uri()
    for factor in (1.0, 2.0):
        commit(run_dir, [], lines_of(0, 5, factor))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", store)
            with trackers.follow_run(run, str(run_dir), read_segments, pytest.fail):
                pass
        shutil.rmtree(run_dir)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    runs = client.search_runs([client.get_experiment_by_name("ftray").experiment_id], order_by=["start_time"])
    curves = [[m.value for m in client.get_metric_history(each.info.run_id, "loss")] for each in runs]
    assert curves == [[each["loss"] for each in lines_of(0, 5, factor)] for factor in (1.0, 2.0)]
    assert [each.info.status for each in runs] == ["FINISHED", "FINISHED"]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_of_a_run_without_a_checkpoint_there_is_nothing_to_tell(name: str, tmp_path: Path) -> None:
    pytest.importorskip(trackers.LIBRARIES[name])
    run, run_dir = make(tmp_path, name)
    with trackers.follow_run(run, str(run_dir), read_segments, pytest.fail) as committed:
        committed()
    assert not list(run_dir.glob("wandb/offline-run-*"))


def test_a_run_that_another_process_took_over_is_left_to_that_one(tmp_path: Path) -> None:
    run, run_dir = make(tmp_path, "tensorboard")
    commit(run_dir, [], lines_of(0, 10))
    with trackers.follow_run(run, str(run_dir), read_segments, pytest.fail, lambda: False) as committed:
        committed()
    assert not (run_dir / "tensorboard").exists()


def test_a_server_of_wandb_that_never_answers_does_not_hold_the_command_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    _, run_dir = make(tmp_path, "wandb")
    commit(run_dir, [], lines_of(0, 10))
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        words = [sys.executable, "-c", DEAF, str(tmp_path / "run.yaml"), str(run_dir)]
        ended = subprocess.run(words, timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "wandb is not done after 3 s; its curves may lack the last steps\n"


def test_tensorboard_leaves_what_the_timeline_has_left(tmp_path: Path) -> None:
    run, run_dir = make(tmp_path, "tensorboard")
    board = trackers.TensorBoard(run, str(run_dir))
    first = commit(run_dir, [], lines_of(0, 10))
    other = commit(run_dir, first.segments, lines_of(10, 20, factor=2.0))
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard/notes").write_text("a user's own")
    board.update(read_segments(str(run_dir), {}))
    assert len(read_tensorboard(run_dir, "loss")) == 19
    (run_dir / f"checkpoints/step-{other.step:06d}/manifest.json").unlink()  # damaged, say
    last = commit(run_dir, first.segments, lines_of(10, 25))
    trackers.TensorBoard(run, str(run_dir)).update(read_segments(str(run_dir), {}))
    merge_metrics(str(run_dir), last)
    assert read_tensorboard(run_dir, "loss") == curve_of_the_run(run_dir, "loss", "tensorboard")
    assert (run_dir / "tensorboard/notes").exists()


def test_a_tracker_that_fails_or_hangs_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, run_dir = make(tmp_path, "mlflow", "tensorboard")
    told: list[str] = []
    (run_dir / "mlflow").parent.mkdir(parents=True)
    (run_dir / "mlflow").write_text("in the way")
    commit(run_dir, [], lines_of(0, 10))
    with trackers.follow_run(run, str(run_dir), read_segments, told.append) as committed:
        for _ in range(3):
            committed()
    assert len(told) == 1
    assert told[0].startswith("mlflow could not be updated (")
    assert len(read_tensorboard(run_dir, "loss")) == 9
    released = threading.Event()

    class Stuck(trackers.TensorBoard):
        def update(self, segments: list[Any]) -> None:
            released.wait()
            raise ConnectionError

    monkeypatch.setattr(trackers, "END_S", 0.1)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Stuck)
    run, run_dir = make(tmp_path, "tensorboard")
    with trackers.follow_run(run, str(run_dir), read_segments, told.append) as committed:
        committed()
    released.set()
    assert told[1:] == ["tensorboard is not done after 0 s; its curves may lack the last steps"]


def test_a_missing_library_or_place_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make(tmp_path, "wandb")
    monkeypatch.setitem(trackers.LIBRARIES, "wandb", "no_such_module")
    with pytest.raises(ConfigError, match=r"tracking.trackers contains wandb, but .* pip install 'ftray\[wandb\]'"):
        trackers.check_trackers(run)
    run, _ = make(tmp_path, "mlflow", storage="s3://bucket/runs")
    monkeypatch.setitem(trackers.LIBRARIES, "mlflow", "json")
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        trackers.check_trackers(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    trackers.check_trackers(run)
    with pytest.raises(ConfigError, match=r"tracking.trackers \(\[\"mlflow\", \"mlflow\"\]\)|lists a tracker twice"):
        make(tmp_path, "mlflow", "mlflow")
