"""What is exported is, to the bit, what the live engine held at that step: ZeRO-3, tied and resized vocabularies too.

No Ray: two processes with the Trainer's own engine.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ftray.console import Console
from ftray.model.lora import dtype_of
from ftray.train.checkpoint.catalog import RunProgress
from ftray.train.checkpoint.writer import CheckpointWriter
from ftray.train.export import export
from ftray.train.zero.state import local_parts
from tests import cluster, ranks, tiny

# name → (tied embeddings, entries of the vocabulary, settings); 531 and 2 ranks: parts with padding
CASES: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "plain": (False, 512, {"train__precision": "fp32"}),
    "tied-resized": (True, 531, {"train__precision": "bf16"}),
    "resized-offloaded": (False, 531, {"train__precision": "bf16", "deepspeed__offload": "all"}),
    "lora-tied-resized": (True, 531, {"train__precision": "bf16", "method__type": "lora"}),
}


def run_of(root: Path, name: str) -> Any:
    sharded = {"deepspeed__overrides": ranks.SHARD_ALL}
    settings = {
        "method__type": "full",
        **sharded,
        "deepspeed__zero_stage": 3,
        "train__global_batch_size": 2,
        **CASES[name][2],
    }
    return cluster.make_run(root / "runs" / name, root / name, root, method__dropout=0.0, **settings)


def train_and_save(rank: int, root: Path) -> dict[str, Any]:
    """Masters and computing weights of the live engine by name, gathered by DeepSpeed, at the step that is saved."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name in CASES:
        run = run_of(root, name)
        engine, parameters = ranks.build_engine(run)
        ranks.train_steps(engine, 0, 2)
        masters = {n: safe_get_full_fp32_param(p).cpu().clone() for n, p in parameters.items()}
        computing = {}
        for n, p in parameters.items():
            with deepspeed.zero.GatheredParameters([p]):
                computing[n] = p.detach().cpu().clone()
        found[name] = (masters, computing)
        writer = CheckpointWriter(run.directory, 9, {}, run.method.type != "full", ranks.mesh())
        line = {"step": 1, "learning_rate": 1e-2, "grad_norm": 1.0}
        writer.save(RunProgress(2, 2), local_parts(engine, parameters, ranks.mesh()), [line])
        ranks.train_steps(engine, 2, 3)  # the weights go on while they are written
        writer.wait()
        engine.destroy()
    return found


@pytest.mark.long
def test_exported_weights_are_those_of_the_live_engine_to_the_bit(tmp_path: Path) -> None:
    for name, (is_tied, vocabulary, _) in CASES.items():
        tiny.write_resized_model(tmp_path / name, is_tied, vocabulary)
    live = ranks.run_ranks(2, train_and_save, tmp_path)[0]
    for name, (is_tied, vocabulary, _) in CASES.items():
        run, (masters, computing) = run_of(tmp_path, name), live[name]
        dtype = dtype_of(run.train.precision)
        where = export(run, run.directory, Console(io.StringIO()))
        loaded = AutoModelForCausalLM.from_pretrained(where, dtype="auto")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        weights, before = dict(loaded.named_parameters()), dict(base.named_parameters())
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied
        assert loaded.lm_head.weight.shape[0] == loaded.config.vocab_size == vocabulary
        if run.method.type == "full":
            assert weights.keys() == masters.keys()
            for n, weight in weights.items():
                assert weight.dtype == dtype
                assert torch.equal(weight, masters[n].to(dtype)), n
                assert torch.equal(weight, computing[n]), n
                assert not torch.equal(masters[n], before[n]), f"{n} has not moved, so equality says nothing"
            continue
        changed = 0
        for n, weight in weights.items():
            layer = f"base_model.model.{n.removesuffix('.weight')}"
            expected = before[n]  # the base as it is stored; rounded once, with the adapter in it
            if f"{layer}.lora_A.default.weight" in masters:
                a, b = (masters[f"{layer}.lora_{x}.default.weight"] for x in "AB")
                expected = expected + (b @ a) * (run.method.alpha / run.method.rank)
                changed += 1
            assert torch.equal(weight, expected.to(dtype)), n
        assert changed == 14
