"""The training benchmarks, small and on a CPU: fast paths follow the plain one, the bare loop and the trial of fits run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import fit_trial, loss_follows, plain_loop, zero_speed
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


def test_a_trial_of_fits_measures_the_choice_all_rows_by_hand_and_recomputing(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", base, "--seq", "64", "--document", "16", "--batch", "4", "--steps", "1", "--warmup", "1"]
    monkeypatch.setattr("sys.argv", ["fit_trial", *arguments])
    fit_trial.main()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    chosen, *by_hand, recomputed, best = told
    assert [(each["by_hand"]["rows"], each["by_hand"]["recomputed"]) for each in by_hand] == [
        (1, "0/2"),
        (2, "0/2"),
        (4, "0/2"),
    ]
    assert recomputed["recomputed"]["recomputed"] == "2/2"
    assert recomputed["recomputed"]["rows"] == chosen["chosen"]["rows"]
    speeds = {"chosen": chosen["chosen"]["tokens_per_s"]}
    speeds |= {f"{each['by_hand']['rows']} rows, none": each["by_hand"]["tokens_per_s"] for each in by_hand}
    assert best["best"] == max(speeds, key=speeds.__getitem__)
    assert best["chosen_over_best"] == pytest.approx(speeds["chosen"] / max(speeds.values()), abs=1e-4)


def test_the_step_that_benchmarks_time_is_the_mean_loss_of_all_micro_batches(base: str) -> None:
    """Two micro-batches of a row give the gradients of one; after the step none is left."""
    from argparse import Namespace

    from ftray.model.lora import build_model, trainable
    from ftray.train.objectives.base import ObjectiveModel
    from ftray.train.objectives.sft import Sft

    given = Namespace(model=base, seq=64, document=16)
    steps = []

    class Spy:
        def step(self) -> None:
            steps.append([weight.grad.clone() for weight in weights])

        def zero_grad(self) -> None:
            for weight in weights:
                weight.grad = None

    run = fit_trial.run_of(Namespace(**vars(given), batch=2, method="full", optimizer="adamw"), 1, "none")
    built = build_model(run.model, run.method, "fp32", 0)
    weights, model = list(trainable(built).values()), ObjectiveModel(built, Sft()).train()
    batch = plain_loop.batch_of(given, 1, built.config.vocab_size, torch.device("cpu"))
    for accumulate in (1, 2):
        plain_loop.take_step(model, Spy(), batch, accumulate)  # type: ignore[arg-type]
    for one, two in zip(*steps, strict=True):
        torch.testing.assert_close(one, two)
    assert all(weight.grad is None for weight in weights)


def test_the_step_under_zero_is_timed_with_its_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = "zero_speed --shape tiny --ranks 2 --seq 64 --document 32 --micro 2 --accumulate 2 --warmup 1 --steps 1"
    monkeypatch.setattr(
        "sys.argv", [*words.split(), "--set", "stage3_prefetch_bucket_size=1000", "--work", str(tmp_path)]
    )
    zero_speed.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["stage"], told["rows"], told["accumulate"], told["recomputed"]) == (3, 2, 2, 0)
    assert told["tokens_per_s_per_gpu"] == pytest.approx(2 * 2 * 64 / told["step_s"], rel=0.1, abs=0.5)
    assert set(told["one_after_the_other_s"]) == {"forward", "backward", "end"}


def test_flops_count_four_for_a_frozen_weight_six_for_a_trained_one_and_none_for_looking_up() -> None:
    embedding = 512 * 64
    assert flops_per_token(embedding + 1000, "lora", "tiny") == 4000
    assert flops_per_token(embedding + 1000, "full", "tiny") == 6000
