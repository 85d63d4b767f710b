"""Rows at once and recomputed layers: the fastest pair that fits, and a recompute that changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftray import config
from ftray.errors import ConfigError
from ftray.train.batch import collate
from ftray.train.memory import GIB, HeadMemory, MemoryModel, best_fit, head_of, max_sequence_tokens, state_bytes
from ftray.train.memory_tuning import tune_memory
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import Sft
from ftray.train.parallel import DeviceMesh
from tests import tiny

NO_HEAD = HeadMemory(0, 0, 0)
LARGE = MemoryModel(139 * GIB, 40 * GIB, 4.0e6, 0.3e6, 32, 0, NO_HEAD)


def _run(zero_stage: int = 2, offload: str = "none", **train: object) -> config.RunConfig:
    tree = {"name": "t", "model": {"base": "b"}, "data": {"train": [{"path": "p"}]}}
    tree |= {"train": {"global_batch_size": 8, **train}, "deepspeed": {"zero_stage": zero_stage, "offload": offload}}
    return config.parse_run(tree, "test")


def test_many_rows_are_taken_before_any_layer_is_recomputed() -> None:
    fit = best_fit(LARGE, [1, 2, 4, 8, 16], list(range(33)), 4096)
    assert (fit.micro_batch_size, fit.layers) == (4, 0)
    assert fit.peak is not None
    assert fit.peak < 0.95 * 139 * GIB


def test_a_row_too_long_to_be_kept_recomputes_as_few_layers_as_it_must() -> None:
    fit = best_fit(LARGE, [1, 2, 4], list(range(33)), 32768)
    assert fit.micro_batch_size == 1
    assert 0 < fit.layers < 32
    assert LARGE.peak(32768, fit.layers - 1) > 0.95 * 139 * GIB


def test_where_nothing_fits_the_smallest_is_tried() -> None:
    fit = best_fit(MemoryModel(GIB, 2 * GIB, 4e6, 3e5, 32, 0, NO_HEAD), [1, 2], [0, 16, 32], 4096)
    assert (fit.micro_batch_size, fit.layers) == (1, 32)


def test_the_rows_that_a_run_was_begun_with_are_kept_where_they_fit_though_others_are_faster() -> None:
    rows, layers = [1, 2, 4, 8, 16], list(range(33))
    assert [best_fit(LARGE, rows, layers, 4096, before).micro_batch_size for before in (None, 1, 2, 8)] == [4, 1, 2, 8]
    assert best_fit(LARGE, rows, layers, 4096, 8).layers > 0, "room is made for them"
    smaller = MemoryModel(80 * GIB, 70 * GIB, 4e6, 1e6, 32, 0, NO_HEAD)
    assert best_fit(smaller, rows, layers, 4096, 16) == best_fit(smaller, rows, layers, 4096)
    assert best_fit(LARGE, [1, 3], layers, 4096, 2) == best_fit(LARGE, [1, 3], layers, 4096), (
        "another number of workers"
    )


def test_the_peak_is_with_all_activations_or_in_the_update_whichever_is_more() -> None:
    memory = MemoryModel(80 * GIB, 10 * GIB, 4e6, 1e6, 32, 0, NO_HEAD)
    with_activations = memory.peak(4096, 0)
    assert with_activations > 24 * GIB
    assert replace(memory, update=5 * GIB).peak(4096, 0) == with_activations
    assert replace(memory, update=30 * GIB).peak(4096, 0) == 40 * GIB


def test_what_is_offloaded_is_not_counted_on_the_gpu() -> None:
    both = [state_bytes(_run(2, how), 10**9, 2, 10**9) for how in ("none", "optimizer")]
    assert [each.optimizer for each in both] == [6e9, 0.0]
    assert [each.update for each in both] == [3e9, 0.0]
    assert both[0].gradients == both[1].gradients == 1e9
    assert both[0].bucket == both[1].bucket == 1e9


def test_a_row_is_longer_by_the_virtual_tokens_in_front_of_each_document() -> None:
    plain = _run()
    prompt = plain.model_copy(update={"method": config.MethodConfig.model_validate({"type": "prompt-tuning"})})
    assert max_sequence_tokens(plain, 30) == plain.data.max_seq_len
    assert max_sequence_tokens(prompt, 30) == plain.data.max_seq_len + 30 * prompt.method.num_virtual_tokens


def test_on_a_cpu_auto_is_one_row_and_no_layer_or_what_it_was_before() -> None:
    loss = ObjectiveModel(tiny.make_model(), Sft())
    fit = tune_memory(_run(), loss, DeviceMesh(0, 2))
    assert (fit.micro_batch_size, fit.layers, fit.peak) == (1, 0, None)
    sizes = [tune_memory(_run(), loss, DeviceMesh(0, 2), before).micro_batch_size for before in (2, 3, 8)]
    assert sizes == [2, 1, 1], "of four rows for each worker"
    given = tune_memory(_run(micro_batch_size=4), loss, DeviceMesh(0, 2), 2)
    assert given.micro_batch_size == 4, "what the run file says stands"


@pytest.mark.parametrize(("recompute", "layers"), [("selective", 1), ("full", 2)])
def test_recomputed_layers_give_the_same_loss_and_gradients(recompute: str, layers: int) -> None:
    ids = np.random.default_rng(0).integers(2, tiny.VOCAB_SIZE, (2, 64)).astype(np.int32)
    positions = np.broadcast_to(np.arange(64) % 24, (2, 64)).astype(np.int32)
    batch = collate(ids, np.roll(ids, -1, 1), positions, np.array([64, 50], np.int32))
    found = []
    for how in ("none", recompute):
        loss = ObjectiveModel(tiny.make_model(), Sft()).train()
        fit = tune_memory(_run(gradient_checkpointing=how), loss, DeviceMesh(0, 1))
        value, _ = loss(batch)
        value.backward()
        found.append((float(value), [p.grad for p in loss.parameters()]))
    assert fit.layers == layers
    assert (
        sum(getattr(m, "gradient_checkpointing", False) is True for m in loss.modules() if hasattr(m, "self_attn"))
        == layers
    )
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_model_without_such_layers_says_so() -> None:
    class Plain(torch.nn.Module):
        model = torch.nn.Linear(2, 2)

    with pytest.raises(
        ConfigError, match=r"train\.gradient_checkpointing full: this model has no layers that support it; use none"
    ):
        tune_memory(_run(gradient_checkpointing="full"), Plain(), DeviceMesh(0, 1))  # type: ignore[arg-type]


def test_bytes_of_states_are_counted_by_optimizer_and_stage() -> None:
    number = 10**6
    assert state_bytes(_run(0, optimizer="adamw-8bit"), number, 1, number).lasting == pytest.approx(6.2e6)
    assert state_bytes(_run(0), number, 2, number).lasting == 12e6
    paged = state_bytes(_run(0, optimizer="adamw-paged"), 10 * number, 2, number)
    assert paged.lasting == 40e6 + 8e6, "moments of one parameter at a time"
    eight = state_bytes(_run(0, optimizer="adamw-8bit-paged"), 10 * number, 2, number)
    assert eight.lasting == pytest.approx(40e6 + 2.2e6)
    wide = _run(2).model_copy(
        update={"deepspeed": config.DeepSpeedConfig(overrides={"zero_optimization": {"reduce_bucket_size": 7}})}
    )
    assert (state_bytes(_run(2), number, 2, number).bucket, state_bytes(wide, number, 2, number).bucket) == (1e9, 14)
    assert state_bytes(_run(0), number, 2, number).bucket == 0
    assert state_bytes(_run(1), number, 2, number).lasting == 2e6 + 6e6 + 1e9
    assert state_bytes(_run(2), number, 2, number).lasting < state_bytes(_run(2), number, 1, number).lasting


def test_logits_take_more_in_fp32_with_smoothing_and_where_they_do_not_come_in_pieces() -> None:
    tree = {"name": "t", "model": {"base": "b"}, "data": {"train": [{"path": "p"}]}}
    plain = config.parse_run(tree, "test")
    vocabulary, width = 128_256, 4096
    piece = 4096  # tokens: 2^29 logits
    assert head_of(plain, vocabulary, width, False).bytes(100 * piece) == 4 * vocabulary * piece
    assert head_of(plain, vocabulary, width, False).bytes(100) == 4 * vocabulary * 100
    assert head_of(plain, vocabulary, width, True).bytes(0) == 4 * vocabulary * width
    whole = config.parse_run({**tree, "train": {"precision": "fp32"}}, "test")
    assert head_of(whole, vocabulary, width, False).bytes(100 * piece) == 8 * vocabulary * piece
    smooth = config.parse_run({**tree, "train": {"label_smoothing": 0.1}}, "test")
    assert head_of(smooth, vocabulary, width, False).bytes(100 * piece) == 12 * vocabulary * piece
    assert head_of(plain, vocabulary, width, True, in_pieces=False).bytes(100 * piece) == 8 * vocabulary * 100 * piece
