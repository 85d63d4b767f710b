"""The training benchmarks, small and on a CPU: fast paths follow the plain one, the bare loop runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench import loss_follows, plain_loop
from bench.train_throughput import flops_per_token
from ftray.data.packing import pack_examples
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16))


def _rows() -> loss_follows.Arrays:
    rng, found = np.random.default_rng(0), {}
    for split in ("train", "test"):
        lengths = rng.integers(8, 60, 40)
        examples = [(rng.integers(2, tiny.VOCAB_SIZE, n), np.arange(n) > n // 3) for n in lengths]
        rows = pack_examples(examples, 64, 0)
        for field in ("input_ids", "labels", "position_ids"):
            found[f"{split}_{field}"] = np.stack([getattr(row, field) for row in rows])
        found[f"{split}_num_tokens"] = np.array([row.num_tokens for row in rows], np.int32)
    return found


@pytest.mark.parametrize("path", ["lora bf16", "full bf16", "full adamw-8bit"])
def test_a_fast_paths_losses_follow_plain_transformers_in_fp32(base: str, path: str) -> None:
    device, rows = torch.device("cpu"), _rows()
    wanted, wanted_heldout = loss_follows.reference(base, path.split(maxsplit=1)[0], rows, 5, device)
    losses, heldout = loss_follows.fast(base, path, rows, 5, device)
    assert losses == pytest.approx(wanted, rel=0.01)
    assert heldout == pytest.approx(wanted_heldout, rel=0.01)


def test_the_bare_loop_tells_its_speed_and_what_it_chose(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", base, "--rows", "auto", "--batch", "2", "--seq", "64", "--steps", "1", "--warmup", "0"]
    monkeypatch.setattr("sys.argv", ["plain_loop", *arguments, "--recompute", "full"])
    plain_loop.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["rows"], told["accumulate"], told["recomputed"]) == (1, 2, "2/2")
    assert told["tokens_per_s"] > 0


def test_flops_count_four_for_a_frozen_weight_six_for_a_trained_one_and_none_for_looking_up() -> None:
    embedding = 512 * 64
    assert flops_per_token(embedding + 1000, "lora", "tiny") == 4000
    assert flops_per_token(embedding + 1000, "full", "tiny") == 6000
