"""Checkpoints on their way to storage: killed at every write, on a full disk, with a store that is down for a while (P5)."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray import storage
from ftray.errors import StorageError
from ftray.train.checkpoint.catalog import RunProgress, find_newest
from ftray.train.checkpoint.tensors import TensorPart
from ftray.train.checkpoint.writer import CheckpointWriter, load_checkpoint
from tests.s3 import FaultyProxy, S3Server

WRITES = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"weights.a": torch.full((64, 64), float(step)), "exp_avg.a": torch.full((64, 64), -float(step))}


def parts_of(step: int) -> list[TensorPart]:
    return [TensorPart(name, tuple(t.shape), 0, t.flatten()) for name, t in tensors_of(step).items()]


def lines_of(step: int) -> list[dict[str, Any]]:
    return [{"step": number, "loss": 1.0} for number in (step - 2, step - 1)]


def save(run_dir: str, *steps: int, keep: int = 2) -> None:
    """Checkpoints of these steps, each counting the metrics of the two steps before it."""
    writer = CheckpointWriter(run_dir, keep, {"config_hash": "c"}, whole=True)
    found = find_newest(run_dir, no_warning)
    progress = found.progress if found else RunProgress()
    for step in steps:
        progress.step = step
        writer.save(progress, parts_of(step), lines_of(step))
    writer.wait()


def no_warning(text: str) -> None:
    raise AssertionError(text)


def newest(run_dir: str) -> int:
    """The step of the newest sound checkpoint, whose tensors are what was saved at that step."""
    found = find_newest(run_dir, no_warning)
    if found is None:
        return 0
    loaded = load_checkpoint(found)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tensors_of(found.step).items())
    for segment in found.progress.segments:
        assert storage.exists(storage.join(run_dir, "metrics", segment))
    return found.step


def die_at(count: int, below: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: the process is gone before its `count`-th write below a directory."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        reading = event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in WRITES and not reading and any(str(a).startswith(below) for a in arguments[:2]):
            seen += 1
            if seen == count:
                os._exit(9)

    return hook


def killed_at(count: int, run_dir: str, *steps: int) -> bool:
    """Saves in a child that dies at its `count`-th write; False if it made fewer."""
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(die_at(count, run_dir))
            save(run_dir, *steps)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_killed_at_any_write_the_newest_complete_checkpoint_loads_and_saving_goes_on(tmp_path: Path) -> None:
    count, stood_at = 0, set()
    while True:
        count += 1
        run_dir = str(tmp_path / str(count))
        save(run_dir, 2, 4)
        killed = killed_at(count, run_dir, 6, 8)  # with keep=2 these delete the two before them
        step = newest(run_dir)
        stood_at.add(step)
        assert step >= 4
        again = [s for s in (6, 8, 10) if s > step]
        save(run_dir, *again)
        assert newest(run_dir) == 10
        if not killed:
            break
    assert count > 20, "too few writes were seen for this to prove anything"
    assert stood_at == {4, 6, 8}


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run_dir = str(tmp_path / "run")
    save(run_dir, 2, 4)
    names = sorted(file.name for file in (tmp_path / "run/checkpoints/step-000004").iterdir())
    names.remove(storage.MARK)  # says only that there was a manifest
    for name in names:
        warnings: list[str] = []
        file = tmp_path / "run/checkpoints/step-000004" / name
        whole = file.read_bytes()
        damage(file)
        found = find_newest(run_dir, warnings.append)
        assert found is not None
        assert found.step == 2
        if (name, damage) != (storage.MANIFEST, Path.unlink):  # without one it was never committed
            assert len(warnings) == 1
            assert "step-000004" in warnings[0]
        file.write_bytes(whole)
        assert newest(run_dir) == 4


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """What a quota does: this process can't write beyond so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_its_path_and_the_checkpoint_before_it_stays(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    save(run_dir, 2)
    with files_of_at_most(8000), pytest.raises(StorageError, match=r"step-000004.* can't be written: no space is left"):
        save(run_dir, 4)
    assert not (tmp_path / "run/checkpoints/step-000004").exists(), "half a checkpoint fills the disk further"
    assert newest(run_dir) == 2
    save(run_dir, 4)
    assert newest(run_dir) == 4


def test_a_store_that_is_down_longer_than_its_deadline_delays_a_checkpoint_and_loses_none(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = f"{s3.uri}/{time.monotonic_ns()}"
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "1")
    with FaultyProxy(s3.endpoint, 0.0, ("503", "reset")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        save(run_dir, 2)
        proxy.fraction = 1.0
        writer = CheckpointWriter(run_dir, 2, {"config_hash": "c"}, whole=True)
        writer.save(RunProgress(step=4), parts_of(4), lines_of(4))  # returns at once
        threading.Timer(2.5, setattr, (proxy, "fraction", 0.0)).start()
        writer.wait()
        assert newest(run_dir) == 4


def test_one_that_stays_down_is_told_in_the_end(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "0.1")
    with FaultyProxy(s3.endpoint, 1.0, ("503",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises(StorageError, match=r"gave no good answer for .* within 1 s"), storage.patient():
            storage.read_bytes(f"{s3.uri}/x")


def test_patience_holds_in_the_threads_that_copy_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "3")
    with storage.patient():
        assert storage.transfer.in_parallel(lambda _: storage.s3.retry_s.get(), range(8)) == [30.0] * 8
    assert storage.transfer.in_parallel(lambda _: storage.s3.retry_s.get(), range(2)) == [None] * 2


def test_what_a_killed_writer_left_is_no_part_of_the_next_checkpoint(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints/step-000002"
    left.mkdir(parents=True)
    (left / "of-another-writer.safetensors").write_bytes(b"x")
    save(str(tmp_path), 2)
    assert newest(str(tmp_path)) == 2
    assert not (left / "of-another-writer.safetensors").exists()
