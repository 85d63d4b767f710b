"""`ftray runs gc`: what no run needs goes; what a run needs, what is young, and what a live owner holds stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftray import storage
from ftray.cli.main import main
from ftray.errors import StorageError
from ftray.storage import s3 as store
from ftray.storage.s3 import request
from ftray.train.checkpoint.catalog import RunProgress, list_checkpoints, merge_metrics
from ftray.train.checkpoint.tensors import TensorPart
from ftray.train.checkpoint.writer import CheckpointWriter

PARTS = [TensorPart("weights.a", (4,), 0, torch.ones(4))]


def lines(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step} for step in steps]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run at step 4 that fell back once, with a checkpoint that was being written when its writer was killed."""
    place = tmp_path / "runs/one"
    writer = CheckpointWriter(str(place), 9, {}, whole=True)
    writer.save(RunProgress(step=2), PARTS, lines(0, 1))
    writer.save(RunProgress(step=4, segments=["00000000-00000001.jsonl"]), PARTS, lines(2, 3))
    writer.wait()
    (place / "metrics/00000004-00000009.jsonl").write_text('{"step": 4}\n')  # of a checkpoint that did not come to be
    left = place / "checkpoints/step-000010"
    left.mkdir()
    (left / "state.safetensors").write_bytes(bytes(1000))
    (place / "run.json").write_text("{}")
    return place


def files(run_dir: Path) -> set[str]:
    return {file.path for file in storage.list_files(str(run_dir)) if not file.path.startswith("lease/")}


ORPHANS = {"checkpoints/step-000010/state.safetensors", "metrics/00000004-00000009.jsonl"}


def test_orphans_go_and_the_run_is_whole(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run_dir)
    assert main(["runs", "gc", str(run_dir.parent), "--older-than", "0", "--dry-run"]) == 0
    assert files(run_dir) == before
    assert capsys.readouterr().out.count("would delete: ") == 2
    assert main(["runs", "gc", str(run_dir.parent), "--older-than", "0"]) == 0
    assert "1 runs, 1.0 kB freed" in capsys.readouterr().out
    assert before - files(run_dir) == ORPHANS
    newest = list_checkpoints(str(run_dir))[0]
    assert newest.step == 4
    assert merge_metrics(str(run_dir), newest.progress) == 4


def test_the_young_and_the_held_are_left_alone(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run_dir)
    assert main(["runs", "gc", str(run_dir)]) == 0
    with storage.acquire_lease(str(run_dir)):
        assert main(["runs", "gc", str(run_dir), "--older-than", "0"]) == 0
    assert "skipped: run 'one' is held by" in capsys.readouterr().out
    assert files(run_dir) == before


def test_segments_stay_where_a_damaged_manifest_may_count_them(run_dir: Path) -> None:
    manifest = run_dir / "checkpoints/step-000004/manifest.json"
    manifest.write_text(manifest.read_text().replace("4", "5", 1))
    before = files(run_dir)
    assert main(["runs", "gc", str(run_dir), "--older-than", "0"]) == 0
    assert before - files(run_dir) == {"checkpoints/step-000010/state.safetensors"}


def test_a_place_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "gc", str(tmp_path)]) == 2
    assert "is neither the directory of a run nor one that contains runs" in capsys.readouterr().err
    assert main(["runs", "gc", str(tmp_path / "nothing")]) == 2


def test_runs_in_a_bucket_are_swept_the_same(run_dir: Path, s3: Any) -> None:
    place = f"{s3.uri}/swept-{run_dir.stat().st_mtime_ns}"
    for file in storage.list_files(str(run_dir)):
        storage.upload_file(file.uri, storage.join(place, "one", file.path))
    assert main(["runs", "gc", place, "--older-than", "0"]) == 0
    left = {file.path for file in storage.list_files(storage.join(place, "one")) if "lease/" not in file.path}
    assert files(run_dir) - left == ORPHANS


def test_uploads_that_broke_off_go_and_those_of_others_and_the_young_stay(
    run_dir: Path, s3: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{s3.uri}/uploads-{run_dir.stat().st_mtime_ns}"
    mine, other = f"{place}/one", f"{place}/one-more"  # the other's address begins like this run's
    storage.write_bytes(f"{mine}/run.json", b"{}")

    def begin(uri: str, *parts: bytes) -> str:
        """What a writer leaves that is killed between two parts."""
        upload_id = str(request("create_multipart_upload", uri)["UploadId"])
        for number, data in enumerate(parts, 1):
            request("upload_part", uri, UploadId=upload_id, PartNumber=number, Body=data)
        return upload_id

    large = bytes(5 << 20)
    left = {begin(f"{mine}/checkpoints/step-000002/state.safetensors", large, large), begin(f"{mine}/metrics/x.jsonl")}
    foreign = begin(f"{other}/checkpoints/step-000002/state.safetensors", large)
    assert {upload.upload_id for upload in storage.list_uploads(mine)} == left
    assert main(["runs", "gc", mine]) == 0
    assert main(["runs", "gc", mine, "--older-than", "0", "--dry-run"]) == 0
    assert {upload.upload_id for upload in storage.list_uploads(mine)} == left
    told = capsys.readouterr().out
    assert f"would delete: {mine}/checkpoints/step-000002/state.safetensors (unfinished upload, 10.5 MB)" in told
    assert main(["runs", "gc", mine, "--older-than", "0"]) == 0
    assert "1 runs, 10.5 MB freed" in capsys.readouterr().out
    assert storage.list_uploads(mine) == []
    (found,) = storage.list_uploads(other)
    assert (found.upload_id, found.size_bytes) == (foreign, len(large))
    storage.abort_upload(found)
    storage.abort_upload(found)  # one that is no more is fine
    assert storage.list_uploads(place) == []


def test_a_store_that_does_not_list_uploads_is_swept_all_the_same(
    run_dir: Path, s3: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"{s3.uri}/unlisted-{run_dir.stat().st_mtime_ns}"
    storage.write_bytes(f"{place}/run.json", b"{}")
    storage.write_bytes(f"{place}/checkpoints/step-000002/state.safetensors", b"{}")
    send = store.request

    def deny(operation: str, uri: str, *arguments: Any, **more: Any) -> Any:
        if operation == "list_multipart_uploads":
            raise StorageError(f"{uri}: access is denied")
        return send(operation, uri, *arguments, **more)

    monkeypatch.setattr(store, "request", deny)
    assert main(["runs", "gc", place, "--older-than", "0"]) == 0
    told = capsys.readouterr()
    assert "unfinished uploads cannot be listed" in told.out + told.err
    assert "deleted: " in told.out
