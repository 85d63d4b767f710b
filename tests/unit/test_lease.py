"""A run that changes hands, falls back, or ends at an unlucky moment: what is sound stays, and one writes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from ftray import storage
from ftray.data.packing import IGNORE_INDEX
from ftray.errors import CheckpointError, RunHeldError
from ftray.train.checkpoint.catalog import RunProgress, find_newest, list_checkpoints
from ftray.train.checkpoint.tensors import TensorPart
from ftray.train.checkpoint.writer import CheckpointWriter
from ftray.train.eval_loss import eval_share
from ftray.train.parallel import DeviceMesh


def save(run_dir: Path, step: int, keep: int = 9, lease: storage.Token | None = None, value: float = 0.0) -> None:
    writer = CheckpointWriter(str(run_dir), keep, {"config_hash": "c"}, whole=True, lease=lease)
    parts = [TensorPart("weights.a", (4,), 0, torch.full((4,), value))]
    writer.save(RunProgress(step=step), parts, [{"step": step - 1, "loss": float("nan")}])
    writer.wait()


def damage(run_dir: Path, step: int) -> None:
    file = run_dir / f"checkpoints/step-{step:06d}/state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def steps(run_dir: Path) -> list[int]:
    return [found.step for found in list_checkpoints(str(run_dir))]


def test_a_checkpoint_behind_damaged_ones_is_not_swept_for_them(tmp_path: Path) -> None:
    for step in (30, 36, 37):
        save(tmp_path, step)
    damage(tmp_path, 36)
    damage(tmp_path, 37)
    save(tmp_path, 34, keep=1)
    assert steps(tmp_path) == [37, 36, 34]
    found = find_newest(str(tmp_path), lambda _: None)
    assert found is not None
    assert found.step == 34


def test_where_all_checkpoints_are_damaged_nothing_begins_anew_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6)
    damage(tmp_path, 3)
    damage(tmp_path, 6)
    with pytest.raises(CheckpointError, match=r"are damaged; restore one, or delete .*/checkpoints to start again"):
        find_newest(str(tmp_path), lambda _: None)
    assert find_newest(str(tmp_path / "new"), lambda _: None) is None


def test_who_lost_the_run_writes_nothing_more(tmp_path: Path) -> None:
    slow = storage.acquire_lease(str(tmp_path), ttl_s=60.0)
    save(tmp_path, 3, lease=slow.token)
    number = int(slow.token[1]) + 1
    storage.write_bytes(f"{tmp_path}/lease/{number:06d}.json", json.dumps({}).encode())
    (tmp_path / "checkpoints/step-000006").mkdir()
    (tmp_path / "checkpoints/step-000006/state.safetensors").write_bytes(b"half of the new owner's")
    with pytest.raises(RunHeldError, match="another process took over the run"):
        save(tmp_path, 6, lease=slow.token)
    assert (tmp_path / "checkpoints/step-000006/state.safetensors").read_bytes() == b"half of the new owner's"
    assert steps(tmp_path) == [3]
    save(tmp_path, 6, lease=(slow.token[0], number), value=1.0)
    assert steps(tmp_path) == [6, 3]


def test_metrics_are_json_whatever_a_loss_is(tmp_path: Path) -> None:
    save(tmp_path, 3)
    text = next((tmp_path / "metrics").iterdir()).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 2, "loss": None}


@pytest.mark.parametrize(("num_rows", "world_size"), [(4, 2), (3, 2), (1, 4), (5, 3)])
def test_every_rank_has_as_many_heldout_rows_and_each_counts_once(num_rows: int, world_size: int) -> None:
    row = pa.list_(pa.int32(), 2)
    table = pa.table(
        {
            **{name: pa.array([[n, n] for n in range(num_rows)], row) for name in ("input_ids", "position_ids")},
            "labels": pa.array([[n, IGNORE_INDEX] for n in range(num_rows)], row),
            **{name: pa.array(range(num_rows)) for name in ("source", "epoch", "chunk", "sequence")},
            "num_tokens": pa.array([2] * num_rows, pa.int32()),
        }
    )
    shares = [eval_share(table, DeviceMesh(rank, world_size)) for rank in range(world_size)]
    assert len({len(share.labels) for share in shares}) == 1, "sharded weights are gathered by all ranks together"
    learned = sorted(int(label) for share in shares for label in share.labels[:, 0] if label != IGNORE_INDEX)
    assert learned == list(range(num_rows))
