"""A checkpoint's parts: any reader gets any elements of what any writers wrote, and nothing incomplete is committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftray import storage
from ftray.errors import CheckpointError, StorageError
from ftray.train.checkpoint.catalog import RunProgress, find_newest, list_checkpoints
from ftray.train.checkpoint.tensors import (
    HostBuffer,
    TensorPart,
    TensorPartReader,
    assemble,
    check_complete,
    layout,
    pieces,
    write_parts,
)
from ftray.train.checkpoint.writer import CheckpointWriter, load_checkpoint
from tests.s3 import S3Server

LINE = {"step": 0, "learning_rate": 1e-3, "grad_norm": 2.0}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weights.a": torch.randn(7, 5),
        "weights.b": torch.randn(1),
        "weights.half": torch.randn(33).to(torch.bfloat16),
        "exp_avg.codes": torch.randint(0, 255, (3, 3), dtype=torch.uint8),
    }


def whole_parts(found: dict[str, torch.Tensor]) -> list[TensorPart]:
    return [TensorPart(name, tuple(t.shape), 0, t.flatten()) for name, t in found.items()]


def split(found: dict[str, torch.Tensor], num_writers: int) -> list[list[TensorPart]]:
    """Each tensor cut into as many pieces as there are writers, some of them empty."""
    shares: list[list[TensorPart]] = [[] for _ in range(num_writers)]
    for name, tensor in found.items():
        size = tensor.numel()
        for writer in range(num_writers):
            start, end = size * writer // num_writers, size * (writer + 1) // num_writers
            if start < end:
                shares[writer].append(TensorPart(name, tuple(tensor.shape), start, tensor.flatten()[start:end]))
    return shares


def write_shares(directory: Path, shares: list[list[TensorPart]]) -> None:
    for number, share in enumerate(shares):
        buffer = HostBuffer()
        held = buffer.hold(share)
        total = sum(part.values.nbytes for part in held)
        write_parts(directory / f"state-{number}.safetensors", layout(held), pieces(buffer.first(total)))


def save(run_dir: Path | str, found: dict[str, torch.Tensor], step: int = 1, **keys: Any) -> None:
    writer = CheckpointWriter(str(run_dir), 9, {"config_hash": "c"}, whole=keys.pop("whole", False))
    writer.save(RunProgress(step=step, num_updates=step), whole_parts(found), [LINE | keys])
    writer.wait()


@pytest.mark.parametrize("num_writers", [1, 2, 3, 8, 40])
def test_any_elements_come_back_whoever_wrote_them(tmp_path: Path, num_writers: int) -> None:
    found = tensors()
    write_shares(tmp_path, split(found, num_writers))
    reader = TensorPartReader(str(tmp_path))
    assert reader.shapes() == {name: tuple(tensor.shape) for name, tensor in found.items()}
    for name, tensor in found.items():
        assert torch.equal(reader.whole(name), tensor)
        assert reader.whole(name).dtype == tensor.dtype
        for start, end in ((0, 1), (2, 9), (tensor.numel() - 1, tensor.numel())):
            if end <= tensor.numel():
                assert torch.equal(reader.read(name, start, end), tensor.flatten()[start:end])
    wanted = [(name, 0, tensor.numel()) for name, tensor in found.items()] * 20
    for (name, _, _), values in zip(wanted, reader.read_many(wanted), strict=True):
        assert torch.equal(values, found[name].flatten())


def test_one_writer_s_file_is_plain_safetensors_and_plain_safetensors_can_be_read(tmp_path: Path) -> None:
    found = tensors()
    write_shares(tmp_path, [whole_parts(found)])
    loaded = load_file(tmp_path / "state-0.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found.items())
    (tmp_path / "other").mkdir()
    save_file(found, tmp_path / "other" / "state.safetensors")
    reader = TensorPartReader(str(tmp_path / "other"))
    assert all(torch.equal(reader.whole(name), tensor) for name, tensor in found.items())


def test_shares_are_put_together_to_whole_tensors() -> None:
    found, laid, held = tensors(), [], []
    for share in split(found, 3):
        buffer = HostBuffer()
        parts = buffer.hold(share)
        laid.append(layout(parts))
        held.append(buffer.first(sum(part.values.nbytes for part in parts)))
    whole = assemble(laid, held)
    assert all(torch.equal(whole[name], tensor) for name, tensor in found.items())


def test_the_host_buffer_is_kept_and_what_it_holds_does_not_change_with_the_weights() -> None:
    weights, buffer = torch.ones(1000), HostBuffer()
    (held,) = buffer.hold([TensorPart("weights.a", (1000,), 0, weights)])
    weights.zero_()
    assert held.values.sum() == 1000
    (again,) = buffer.hold([TensorPart("weights.a", (1000,), 0, weights)])
    assert again.values.data_ptr() == held.values.data_ptr()


WRONG: dict[str, list[dict[str, list[Any]]]] = {
    "is empty": [{"weights.a": ["F32", [0, 3], 0, 0]}],
    "has only 2 of 4 contiguous elements": [
        {"weights.a": ["F32", [4], 0, 2]},
        {"weights.a": ["F32", [4], 3, 1]},
    ],  # a hole
    "has only 4 of 6 contiguous elements": [
        {"weights.a": ["F32", [6], 0, 4]},
        {"weights.a": ["F32", [6], 2, 4]},
    ],  # an overlap
    "has only 0 of 4 contiguous elements": [{"weights.a": ["F32", [4], 2, 2]}],  # a rank is missing
    "there are no weights": [{"exp_avg.a": ["F32", [4], 0, 4]}],
}


@pytest.mark.parametrize(("sentence", "layouts"), WRONG.items())
def test_incomplete_tensors_are_not_committed(sentence: str, layouts: list[dict[str, list[Any]]]) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        check_complete(layouts)


def test_an_empty_tensor_can_not_be_committed(tmp_path: Path) -> None:
    save(tmp_path, tensors(), step=1)
    with pytest.raises(CheckpointError, match=r"the tensor weights\.gone is empty"):
        save(tmp_path, {**tensors(), "weights.gone": torch.empty(0, 3)}, step=2)
    assert [found.step for found in list_checkpoints(str(tmp_path))] == [1]


def test_adapters_whose_b_is_still_zero_after_a_step_can_not_be_committed(tmp_path: Path) -> None:
    found = {"weights.q.lora_A.default.weight": torch.ones(2, 3), "weights.q.lora_B.default.weight": torch.zeros(3, 2)}
    save(tmp_path, found, step=1, whole=True, learning_rate=0.0)
    save(tmp_path, found, step=2, whole=True, grad_norm=0.0)  # batches without supervised tokens
    save(tmp_path, found, step=3, whole=True, skipped=True)
    with pytest.raises(CheckpointError, match="all of LoRA's B matrices are zero"):
        save(tmp_path, found, step=4, whole=True)
    found["weights.q.lora_B.default.weight"][1, 1] = 1e-30
    save(tmp_path, found, step=5, whole=True)
    assert [f.step for f in list_checkpoints(str(tmp_path))] == [5, 3, 2, 1]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
@pytest.mark.parametrize("name", ["state-00000-of-00001.safetensors", "state.json"])
def test_each_damaged_file_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path, damage: str, name: str) -> None:
    for step in (1, 2):
        save(tmp_path, tensors(), step=step)
    newest = list_checkpoints(str(tmp_path))[0]
    path = Path(newest.uri, name)
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    warnings: list[str] = []
    used = find_newest(str(tmp_path), warnings.append)
    assert used is not None
    assert used.step == 1
    assert name in warnings[0]
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(newest)
    save(tmp_path, tensors(), step=2)  # the run comes by again
    used = find_newest(str(tmp_path), warnings.append)
    assert used is not None
    assert used.step == 2


def test_in_a_bucket_it_is_the_same(s3: S3Server, tmp_path: Path) -> None:
    run_dir, found = storage.join(s3.uri, "checkpoints", tmp_path.name), tensors()
    large = {**found, "weights.large": torch.randn(5_000_000)}  # 20 MB: uploaded in parts
    for step, whole in ((1, False), (2, True)):
        save(run_dir, large, step=step, whole=whole)
        newest = list_checkpoints(run_dir)[0]
        assert newest.step == step
        loaded = load_checkpoint(newest)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in large.items())
        values = TensorPartReader(newest.uri).read("weights.large", 4_000_001, 4_000_004)
        assert torch.equal(values, large["weights.large"][4_000_001:4_000_004])
    storage.delete(storage.join(newest.uri, "state.safetensors"))
    warnings: list[str] = []
    used = find_newest(run_dir, warnings.append)
    assert used is not None
    assert used.step == 1
    assert "state.safetensors is missing" in warnings[0]


def test_a_file_that_is_no_safetensors_is_said_to_be_damaged(tmp_path: Path) -> None:
    for data in (
        b"",
        b"\xff" * 40,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x0e\0\0\0\0\0\0\0" + json.dumps({"a": [1, 2]}).encode(),
    ):
        (tmp_path / "state.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match="is damaged"):
            TensorPartReader(str(tmp_path))


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no space is left on the device"):
        write_parts(Path("/dev/full"), layout(whole_parts(tensors())), [memoryview(bytes(1 << 20))])
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        save(tmp_path, tensors())


def test_a_file_that_was_never_committed_is_not_read(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    (found,) = list_checkpoints(str(tmp_path))
    save_file({"weights.a": torch.zeros(7, 5)}, Path(found.uri, "state-00001-of-00002.safetensors"))
    assert torch.equal(TensorPartReader(found.uri).whole("weights.a"), tensors()["weights.a"])


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    write_shares(tmp_path, split(tensors(), 3)[:2])  # one file is missing
    reader = TensorPartReader(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has 23 of 35 elements of weights\.a"):
        reader.whole("weights.a")
    with pytest.raises(CheckpointError, match=r"the checkpoint has no weights\.z"):
        reader.read("weights.z")
