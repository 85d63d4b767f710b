"""ZeRO-3 loads a model that no rank ever holds whole: parts from the first moment on, and together the very same values.

No Ray: two processes with the Trainer's own engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.model.lora import build_model, dtype_of
from ftray.train.objectives import objective_of
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.zero.config import deepspeed_config
from ftray.train.zero.init import gathered_in_use, partition_model
from tests import cluster, ranks, tiny

# name → (tied embeddings, entries of the vocabulary, precision, settings); 531 and 2 ranks: parts with padding
CASES: dict[str, tuple[bool, int, str, dict[str, Any]]] = {
    "full": (False, 512, "fp32", {"method__type": "full", "method__freeze": ["layers.0"]}),
    "full-tied": (True, 531, "bf16", {"method__type": "full", "deepspeed__offload": "all"}),
    "lora-dora-tied": (True, 512, "fp32", {"method__dora": True}),
    "lora-resized": (False, 531, "bf16", {"deepspeed__offload": "optimizer"}),
    "full-frozen": (False, 512, "fp32", {"method__type": "full", "method__freeze": ["embed_tokens", "layers.0"]}),
    "lora-recomputed": (False, 512, "fp32", {"train__gradient_checkpointing": "full"}),
    "prompt": (False, 512, "fp32", {"method__type": "prompt-tuning"}),
}

# Blocks whose weights are gathered at once: those that something trained stands before.
AT_ONCE = {
    "full": ["layers.0", "layers.1"],
    "full-tied": ["layers.0", "layers.1"],
    "lora-dora-tied": ["layers.1"],
    "lora-resized": ["layers.1"],
    "full-frozen": [],
    "lora-recomputed": ["layers.1"],
    "prompt": [],
}


def run_of(root: Path, name: str) -> Any:
    _, _, precision, settings = CASES[name]
    sharded = {"deepspeed__zero_stage": 3, "deepspeed__overrides": ranks.SHARD_ALL, "train__precision": precision}
    sizes = {"train__global_batch_size": 2, "train__micro_batch_size": 1, "method__dropout": 0.0}
    return cluster.make_run(root / "runs" / name, root / name, root, **{**sharded, **sizes, **settings})


def build(run: Any, outline: bool = False) -> ObjectiveModel:
    return ObjectiveModel(
        build_model(run.model, run.method, run.train.precision, 0, outline), objective_of(run)
    ).train()


def held(model: torch.nn.Module) -> int:
    """Elements in memory of this rank's own: parts, and what is whole and not just mapped from the model's files."""
    maps = Path("/proc/self/maps").read_text()
    spans = [(int(a, 16), int(b, 16)) for a, b in re.findall(r"^(\w+)-(\w+) .*\.safetensors$", maps, re.MULTILINE)]
    whole = [p for p in model.parameters() if not p.is_meta and not any(a <= p.data_ptr() < b for a, b in spans)]
    return sum(p.numel() for p in whole) + cut(model)


def cut(model: torch.nn.Module) -> int:
    return sum(p.ds_tensor.numel() for p in model.parameters() if hasattr(p, "ds_tensor"))


def spied(act: Callable[[], None], model: torch.nn.Module) -> list[int]:
    """What is held each time that a parameter has just been cut, its whole still there."""
    from deepspeed.runtime.zero import partition_parameters

    seen, free = [], partition_parameters.free_param

    def count_and_free(param: Any) -> None:
        seen.append(held(model))
        free(param)

    partition_parameters.free_param = count_and_free
    try:
        act()
    finally:
        partition_parameters.free_param = free
    return seen


def loss_of(model: Any, rank: int) -> float:
    return float(model(ranks.tiny_batch(0, rank))[0].detach())


def load_both_ways(rank: int, root: Path, names: list[str]) -> dict[str, Any]:
    """Each case in parts, compared with the whole model; then what its engine is given, and what it is when trained."""
    import deepspeed

    found, initialize = {}, deepspeed.initialize
    for name in names:
        run = run_of(root, name)
        whole, model = build(run), build(run, outline=rank > 0)
        added = sum(p.numel() for p in model.parameters() if p.requires_grad) if run.method.type != "full" else 0
        result: dict[str, Any] = {"copied": held(model) - (added if rank == 0 else 0)}
        settings = deepspeed_config(run.train, run.deepspeed, 1, 2)
        seen = spied(lambda m=model, s=settings: partition_model(m, s, ranks.mesh()), model)  # type: ignore[misc]
        expected = dict(whole.named_parameters())
        assert [n for n, _ in model.named_parameters()] == list(expected)
        for n, p in model.named_parameters():
            assert (p.requires_grad, p.dtype) == (expected[n].requires_grad, expected[n].dtype)
            with deepspeed.zero.GatheredParameters([p]):
                assert torch.equal(p, expected[n]), f"{name}: {n}"
        for n, buffer in whole.named_buffers():
            assert torch.equal(model.get_buffer(n), buffer), f"{name}: {n}"
        with gathered_in_use(model, list(model.causal.get_decoder().layers)):
            result["tried"] = loss_of(model, rank)
        sizes = [p.numel() for p in whole.parameters()]
        result |= {"held": held(model), "most": max(seen), "parts": sum(-(-n // 2) for n in sizes), "top": max(sizes)}
        given = []

        def spy(*args: Any, model: Any, given: list[Any] = given, **kwargs: Any) -> Any:
            given.append((sum(p.numel() for p in model.parameters()), cut(model)))
            return initialize(*args, model=model, **kwargs)

        deepspeed.initialize = spy
        try:
            engine, _ = ranks.build_engine(run)
        finally:
            deepspeed.initialize = initialize
        result["at_once"] = [
            n for n, m in engine.module.causal.get_decoder().named_modules() if getattr(m, "_z3_leaf", False)
        ]
        result |= {"given": given, "loss": ranks.train_steps(engine, 0, 1)[0], "whole": loss_of(whole, rank)}
        engine.destroy()
        found[name] = result
    return found


QUICK = ["full-tied", "lora-dora-tied"]


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in CASES if name not in QUICK], marks=pytest.mark.long)]
)
def test_no_rank_ever_holds_more_than_its_parts_and_one_parameter(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        is_tied, vocabulary, precision, _ = CASES[name]
        tiny.write_resized_model(tmp_path / name, is_tied, vocabulary, dtype_of(precision))
    for one in ranks.run_ranks(2, load_both_ways, tmp_path, names):
        for name, found in one.items():
            assert found["copied"] == 0, f"{name}: the base's weights were copied out of their files"
            assert found["held"] == found["parts"], name
            assert found["most"] <= found["parts"] + found["top"], name
            assert found["given"] == [(0, found["parts"])], f"{name}: DeepSpeed was given whole weights"
            close = pytest.approx(found["whole"], rel=1e-6 if CASES[name][2] == "fp32" else 1e-2)
            assert found["loss"] == close, name
            assert found["tried"] == close, name
            assert found["at_once"] == AT_ONCE[name], name
