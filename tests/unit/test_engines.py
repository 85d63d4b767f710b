"""DeepSpeed engines in real processes: every stage, precision and place gives back its state to the bit, to any other.

No Ray. Processes cost seconds to start, so one group of them tries many settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ftray.train.checkpoint.catalog import RunProgress, list_checkpoints
from ftray.train.checkpoint.tensors import TensorPartReader
from ftray.train.checkpoint.writer import CheckpointWriter, load_checkpoint
from ftray.train.optim.loss_scaler import lowered_scale, read_scale, restore_scale
from ftray.train.zero.state import local_parts, restore_parts
from tests import cluster, ranks, tiny

Settings = dict[str, Any]


def setting(method: str, stage: int, precision: str = "fp32", offload: str = "none", **more: Any) -> Settings:
    return {
        "method__type": method,
        "method__dropout": 0.0,
        "deepspeed__zero_stage": stage,
        "deepspeed__offload": offload,
        "train__precision": precision,
        "train__global_batch_size": 2,
        "train__micro_batch_size": 1,
        "deepspeed__overrides": ranks.SHARD_ALL if stage == 3 else {},
        **more,
    }


SETTINGS: dict[str, Settings] = {
    "full-0-bf16": setting("full", 0, "bf16", train__weight_decay=0.1),
    "full-0": setting("full", 0),
    "full-1-fp16": setting("full", 1, "fp16"),
    "full-1-optimizer": setting("full", 1, "bf16", "optimizer"),
    "full-2": setting("full", 2, train__weight_decay=0.1),
    "full-3": setting("full", 3, method__freeze=["embed_tokens", "layers.0"]),
    "full-3-all": setting("full", 3, "bf16", "all"),
    "lora-0-bf16": setting("lora", 0, "bf16"),
    "lora-2-dora": setting("lora", 2, method__dora=True, method__rslora=True),
    "lora-3": setting("lora", 3, "bf16", deepspeed__overrides={}),  # adapters stay whole between steps
    "lora-3-dora": setting("lora", 3, method__dora=True),
    "prompt-2": setting("prompt-tuning", 2, train__label_smoothing=0.1),
}
QUICK = ("full-1-fp16", "full-3-all", "lora-0-bf16", "lora-3")
THE_REST = tuple(name for name in SETTINGS if name not in QUICK)
ELSEWHERE = {0: 2, 1: 3, 2: 1, 3: 0}  # the stage at which another world size takes a state over


def run_of(root: Path, name: str, **more: Any) -> Any:
    return cluster.make_run(root, root / "model", root, **{**SETTINGS[name], **more})


def save(writer: CheckpointWriter, engine: Any, parameters: Any, step: int) -> None:
    progress = RunProgress(step=step, num_updates=step, loss_scale=read_scale(engine))
    parts = local_parts(engine, parameters, ranks.mesh())
    writer.save(progress, parts, [{"step": step, "learning_rate": 1e-2, "grad_norm": 1.0}] if step else [])


def load(run_dir: str, engine: Any, parameters: Any) -> None:
    found = list_checkpoints(run_dir)[0]
    read = TensorPartReader(found.uri).read_many
    restore_parts(engine, parameters, read, found.progress.num_updates, ranks.mesh())
    restore_scale(engine, found.progress.loss_scale)


def train_and_resume(rank: int, root: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """For each setting: losses of steps 0 and 1, and of 2 and 3 without a stop; the latter out of a checkpoint of step 2
    in a new engine and in the same one; the former out of one without any update in the same one.
    """
    ranks.lift_fp16_gate()
    found = {}
    for name in names:
        run = run_of(root, name)
        first, writer = (
            CheckpointWriter(str(root / place), 9, {}, run.method.type != "full", ranks.mesh())
            for place in (f"{name}-begin", name)
        )
        engine, parameters = ranks.build_engine(run)
        save(first, engine, parameters, 0)
        begun = ranks.train_steps(engine, 0, 2)
        save(writer, engine, parameters, 2)
        smooth = ranks.train_steps(engine, 2, 4)  # while the checkpoint is written
        first.wait()
        writer.wait()
        fresh, fresh_parameters = ranks.build_engine(run)
        dist.barrier()
        load(str(root / name), fresh, fresh_parameters)
        resumed = ranks.train_steps(fresh, 2, 4)
        result = {"begun": begun, "smooth": smooth, "resumed": resumed}
        result["same scale"] = read_scale(fresh) == read_scale(engine)
        load(str(root / name), engine, parameters)
        result["again"] = ranks.train_steps(engine, 2, 4)
        load(str(root / f"{name}-begin"), engine, parameters)
        result["anew"] = ranks.train_steps(engine, 0, 2)
        if run.train.precision == "fp16":
            result["overflow"] = overflow(engine, parameters)
        found[name] = result
        engine.destroy()
        fresh.destroy()
    return found


def overflow(engine: Any, parameters: Any) -> list[tuple[float, bool, bool, bool]]:
    """For steps with gradients beyond fp16: scale after it, left out, whether it counts as a search, weights moved."""
    found = []
    for scale in (2.0**40, 2.0**39, 1.0):
        restore_scale(engine, {"cur_scale": scale})
        if scale == 1.0:
            with torch.no_grad():  # nothing to search: at the smallest scale it is the weights' fault
                for group in engine.optimizer.bit16_groups:
                    group[0].fill_(float("inf"))
        before = read_scale(engine)
        weights = ranks.values(local_parts(engine, parameters, ranks.mesh()))
        ranks.train_steps(engine, 4, 5)
        now = ranks.values(local_parts(engine, parameters, ranks.mesh()))
        moved = not all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
        after = read_scale(engine)
        assert after is not None
        found.append((after["cur_scale"], engine.optimizer.overflow, lowered_scale(engine, before), moved))
    return found


def take_over(rank: int, root: Path, names: tuple[str, ...]) -> None:
    """Each checkpoint into an engine of another stage and world size, and out again."""
    for name in names:
        stage = ELSEWHERE[SETTINGS[name]["deepspeed__zero_stage"]]
        plain = {"deepspeed__offload": "none", "train__precision": "fp32", "deepspeed__overrides": {}}
        size = {"train__global_batch_size": 3, "scale__num_workers": 3}
        run = run_of(root, name, deepspeed__zero_stage=stage, **plain, **size)
        engine, parameters = ranks.build_engine(run)
        load(str(root / name), engine, parameters)
        writer = CheckpointWriter(str(root / "other" / name), 9, {}, run.method.type != "full", ranks.mesh())
        save(writer, engine, parameters, 2)
        writer.wait()
        engine.destroy()


def poison(rank: int, root: Path, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """For each setting and poison: whether the step was left out, whether weights moved; then those of a good step."""
    found: dict[str, list[Any]] = {}
    for name in names:
        engine, parameters = ranks.build_engine(run_of(root, name))
        ranks.train_steps(engine, 0, 1)
        for factor in (float("nan"), float("inf"), 1.0):
            before = ranks.values(local_parts(engine, parameters, ranks.mesh()))
            loss = engine(ranks.tiny_batch(1, rank))[0]
            engine.backward(loss * (factor if rank == 1 else 1.0) / 60, scale_wrt_gas=False)  # one rank is enough
            engine.step()
            after = ranks.values(local_parts(engine, parameters, ranks.mesh()))
            moved = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            found.setdefault(name, []).append((engine.optimizer.overflow, moved))
        engine.destroy()
    return found


@pytest.mark.long
def test_nothing_that_is_not_finite_reaches_weights_or_moments(tmp_path: Path) -> None:
    tiny.write_tiny_model(tmp_path / "model")
    names = ("full-0", "full-0-bf16", "full-1-optimizer", "full-2", "full-3", "full-3-all", "lora-2-dora")
    for one in ranks.run_ranks(2, poison, tmp_path, names):
        assert one == {name: [(True, False), (True, False), (False, True)] for name in names}


Trained = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module", params=[QUICK, pytest.param(THE_REST, marks=pytest.mark.long)], ids=["quick", "rest"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("engines")
    tiny.write_tiny_model(root / "model")
    return root, ranks.run_ranks(2, train_and_resume, root, request.param)[0]


def test_a_fresh_engine_goes_on_to_the_bit(trained: Trained) -> None:
    for name, found in trained[1].items():
        assert found["resumed"] == found["smooth"], name
        assert found["same scale"], name
        losses = found["begun"] + found["smooth"]
        assert losses[0] not in losses[1:], name
        assert all(0 < loss < 1000 for loss in losses), name


def test_an_engine_at_work_goes_back_to_the_bit(trained: Trained) -> None:
    for name, found in trained[1].items():
        assert found["again"] == found["smooth"], name
        assert found["anew"] == found["begun"], f"{name}: moments were kept"


def test_a_step_that_overflows_lowers_the_scale_and_moves_nothing(trained: Trained) -> None:
    for name, found in trained[1].items():
        if name.endswith("fp16"):
            first, second, last = found["overflow"]
            assert first == (2.0**39, True, True, False)
            assert second == (2.0**38, True, True, False)
            assert last == (1.0, True, False, False)  # the smallest scale: a bad step, and no exception


def test_each_rank_writes_a_share_of_full_weights_and_adapters_are_one_file(trained: Trained) -> None:
    for name in trained[1]:
        (found,) = list_checkpoints(str(trained[0] / name))
        files = {path.name: path for path in Path(found.uri).glob("*.safetensors")}
        if name.startswith("full"):
            assert sorted(files) == ["state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors"]
            sizes = [path.stat().st_size for path in files.values()]
            assert min(sizes) > 0.4 * max(sizes), name
        else:
            tensors, whole = load_file(files.pop("state.safetensors")), load_checkpoint(found)
            assert not files
            assert tensors.keys() == whole.keys()
            assert all(torch.equal(tensors[key], whole[key]) for key in whole), name


@pytest.mark.long
def test_what_is_frozen_is_not_in_a_checkpoint_and_all_else_is(tmp_path: Path) -> None:
    tiny.write_tiny_model(tmp_path / "model")
    ranks.run_ranks(2, train_and_resume, tmp_path, ("full-3",))
    (found,) = list_checkpoints(str(tmp_path / "full-3"))
    names = set(load_checkpoint(found, "weights."))
    expected = {f"weights.{name}" for name, _ in tiny.make_model().named_parameters()}
    assert names == {name for name in expected if "embed_tokens" not in name and "layers.0." not in name}


@pytest.mark.long
def test_state_is_the_same_at_another_stage_and_world_size(trained: Trained) -> None:
    root, found = trained
    ranks.run_ranks(3, take_over, root, tuple(found))
    for name in found:
        (first,), (second,) = list_checkpoints(str(root / name)), list_checkpoints(str(root / "other" / name))
        mine, other = load_checkpoint(first), load_checkpoint(second)
        assert mine.keys() == other.keys(), name
        assert {key.split(".")[0] for key in mine} == {"weights", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(mine[key], other[key]) for key in mine), name
