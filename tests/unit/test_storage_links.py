"""Symbolic links in a run's directory: deleting removes the link and never what it leads to, and a sweep stops at one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from ftray import storage
from ftray.cli.main import main
from ftray.train.checkpoint.catalog import RunProgress, list_checkpoints
from ftray.train.checkpoint.tensors import TensorPart
from ftray.train.checkpoint.writer import CheckpointWriter

PARTS = [TensorPart("weights.a", (4,), 0, torch.ones(4))]


def save(run_dir: Path, *steps: int, keep: int = 9) -> None:
    writer = CheckpointWriter(str(run_dir), keep, {}, whole=True)
    for step in steps:
        writer.save(RunProgress(step=step), PARTS, [])
        writer.wait()


def steps(run_dir: Path) -> list[int]:
    return [found.step for found in list_checkpoints(str(run_dir))]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another run, which a link leads to."""
    save(tmp_path / "elsewhere/other", 2)
    (tmp_path / "elsewhere/other/run.json").write_text("{}")
    return tmp_path / "elsewhere/other"


def test_a_link_that_is_deleted_leaves_its_target_whole(tmp_path: Path, other: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(other, target_is_directory=True)
    storage.delete_tree(str(link))
    assert not link.is_symlink()
    assert steps(other) == [2]


def test_links_below_a_directory_that_is_deleted_leave_their_targets_whole(tmp_path: Path, other: Path) -> None:
    place, checkpoint = tmp_path / "place", other / "checkpoints/step-000002"
    (place / "below").mkdir(parents=True)
    (place / "below/run").symlink_to(other, target_is_directory=True)
    (place / "checkpoint").symlink_to(checkpoint, target_is_directory=True)
    (place / "below/manifest.json").symlink_to(checkpoint / "manifest.json")
    (place / "below/broken").symlink_to(tmp_path / "nothing")
    storage.delete_tree(str(place))
    assert not place.exists()
    assert steps(other) == [2]
    assert storage.verify_directory(str(checkpoint)) == []


def test_a_link_to_nowhere_is_deleted(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    storage.delete_tree(str(link))
    assert not link.is_symlink()


def test_a_checkpoint_that_is_a_link_is_swept_as_a_link(tmp_path: Path, other: Path) -> None:
    run_dir = tmp_path / "runs/one"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints/step-000002").symlink_to(other / "checkpoints/step-000002", target_is_directory=True)
    save(run_dir, 4, 6, keep=1)
    assert steps(run_dir) == [6]
    assert steps(other) == [2]


def test_the_sweep_leaves_alone_what_lies_behind_a_link(
    tmp_path: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    save(runs / "one", 2)
    (runs / "one/run.json").write_text("{}")
    left = other / "checkpoints/step-000009"
    left.mkdir()
    (left / "state.safetensors").write_bytes(bytes(10))
    (runs / "one/checkpoints/step-000009").symlink_to(left, target_is_directory=True)
    (runs / "two").symlink_to(other, target_is_directory=True)
    assert main(["runs", "gc", str(runs), "--older-than", "0"]) == 0
    text = capsys.readouterr().out
    assert f"skipped: {runs}/two is a symbolic link" in text
    assert f"is behind the symbolic link {runs}/one/checkpoints/step-000009" in text
    assert (left / "state.safetensors").exists()
    assert main(["runs", "gc", str(other), "--older-than", "0"]) == 0, "its own address is named"
    assert not left.exists()
    assert steps(other) == [2]


def test_the_sweep_takes_temporary_files_of_writers_that_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs/one"
    save(run_dir, 2)
    (run_dir / "run.json").write_text("{}")
    old, young = (run_dir / f"checkpoints/step-000002/.{name}.ftray-tmp" for name in ("old", "young"))
    for file in (old, young):
        file.write_bytes(bytes(1000))
    os.utime(old, (time.time() - 7200,) * 2)
    with storage.acquire_lease(str(run_dir)):
        assert main(["runs", "gc", str(run_dir)]) == 0
    assert old.exists(), "its run has a live owner"
    assert main(["runs", "gc", str(run_dir), "--older-than", "0", "--dry-run"]) == 0
    assert "would delete" in capsys.readouterr().out
    assert old.exists()
    assert main(["runs", "gc", str(run_dir), "--older-than", "0"]) == 0
    assert not old.exists()
    assert young.exists(), "its writer may be at work"
    assert storage.verify_directory(str(run_dir / "checkpoints/step-000002")) == []


def test_metrics_stay_when_all_checkpoints_are_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "one"
    writer = CheckpointWriter(str(run_dir), 9, {}, whole=True)
    writer.save(RunProgress(step=2), PARTS, [{"step": 0}, {"step": 1}])
    writer.wait()
    (run_dir / "run.json").write_text("{}")
    storage.delete_tree(str(run_dir / "checkpoints"))
    assert main(["runs", "gc", str(run_dir), "--older-than", "0"]) == 0
    assert [file.name for file in (run_dir / "metrics").iterdir()] == ["00000000-00000001.jsonl"]
