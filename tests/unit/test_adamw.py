"""Our AdamW is AdamW: fp32 masters beside bf16 weights, moments that survive a checkpoint bit for bit."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from ftray.train.checkpoint.tensors import HostBuffer, assemble, check_complete, layout, num_bytes
from ftray.train.memory import EIGHT_BIT, PAGED
from ftray.train.optim.adamw import FULL, AdamW, decode_mean, decode_square, encode_mean, encode_square, whole
from ftray.train.parallel import DeviceMesh
from ftray.train.zero.state import local_parts, restore_parts

SHAPE = (37, 50)


def _grad(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SHAPE, generator=generator) * 10.0 ** torch.randint(-3, 2, SHAPE, generator=generator)


def _start(dtype: torch.dtype, moments: str = FULL, max_grad_norm: float = 1.0) -> tuple[torch.nn.Parameter, AdamW]:
    p = torch.nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(99)).to(dtype))
    return p, AdamW([p], 1e-2, 0.1, max_grad_norm, moments)


def _kept(optimizer: AdamW, p: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a parameter."""
    state = optimizer.state[p]
    kept = {"weights": whole(p, state), **{kind: t for kind, t in state.items() if kind != "rest"}}
    assert {kind: tuple(t.shape) for kind, t in kept.items()} == optimizer.shapes(p)
    return copy.deepcopy(kept)


def _run(p: torch.nn.Parameter, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        p.grad = _grad(step).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masters_are_those_of_torchs_adamw_in_fp32(dtype: torch.dtype) -> None:
    p, ours = _start(dtype)
    theirs = torch.nn.Parameter(p.detach().float())
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for step in range(20):
        p.grad = _grad(step).to(dtype)
        theirs.grad = p.grad.float()
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        reference.step()
        assert ours._global_grad_norm == pytest.approx(float(norm), rel=1e-5)
    master = whole(p, ours.state[p])
    assert torch.allclose(master, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(p, master.to(dtype))  # what computes is the master, rounded


def test_steps_too_small_for_bf16_add_up() -> None:
    p, optimizer = _start(torch.bfloat16)
    before = whole(p, {}).clone()
    optimizer.param_groups[0].update(lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moved = before - whole(p, optimizer.state[p])
    assert torch.allclose(moved, torch.full_like(moved, 1e-3), rtol=0.03)


@pytest.mark.parametrize("moments", [FULL, EIGHT_BIT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_and_put_back_it_goes_on_as_if_nothing_had_happened(dtype: torch.dtype, moments: str) -> None:
    p, optimizer = _start(dtype, moments)
    _run(p, optimizer, range(5))
    saved = _kept(optimizer, p)
    assert set(saved) <= set(AdamW.KINDS)
    _run(p, optimizer, range(5, 9))
    q, again = _start(dtype, moments)
    again.num_updates = 5
    again.import_state(q, saved)
    _run(q, again, range(5, 9))
    for kind, tensor in _kept(optimizer, p).items():
        assert torch.equal(tensor, _kept(again, q)[kind]), kind


def test_eight_bit_moments_take_two_bytes_and_a_scale_and_follow_the_full_ones() -> None:
    masters = []
    for moments in (FULL, EIGHT_BIT):
        p, optimizer = _start(torch.bfloat16, moments)
        _run(p, optimizer, range(100))
        masters.append(whole(p, optimizer.state[p]))
        sizes = sum(t.nbytes for kind, t in optimizer.state[p].items() if kind.startswith("exp_avg"))
    assert sizes < 2.2 * p.numel()
    start = whole(_start(torch.bfloat16)[0], {})
    moved = masters[0] - start
    assert (masters[1] - masters[0]).norm() < 0.1 * moved.norm()


@pytest.mark.parametrize("moments", [FULL, EIGHT_BIT])
def test_paged_moments_are_the_same_and_go_into_either_from_a_checkpoint(moments: str) -> None:
    found = []
    for first, then in ((moments, moments), (moments + PAGED, moments + PAGED), (moments, moments + PAGED)):
        p, optimizer = _start(torch.bfloat16, first)
        _run(p, optimizer, range(3))
        q, again = _start(torch.bfloat16, then)
        again.num_updates = 3
        again.import_state(q, _kept(optimizer, p))
        _run(q, again, range(3, 6))
        found.append(_kept(again, q))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[kind], found[0][kind]) for kind in other)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    p, optimizer = _start(torch.bfloat16, EIGHT_BIT)
    _run(p, optimizer, range(3))
    before = _kept(optimizer, p)
    p.grad = _grad(3).to(p.dtype)
    p.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.overflow
    assert optimizer.num_updates == 3
    assert all(torch.equal(t, _kept(optimizer, p)[kind]) for kind, t in before.items())
    _run(p, optimizer, range(3, 4))
    assert not optimizer.overflow


def test_codes_of_eight_bits_are_near_what_they_stand_for() -> None:
    mean = _grad(0)
    found = decode_mean(*encode_mean(mean))
    assert ((found - mean).abs() <= 0.009 * mean.abs().max()).all()
    square = _grad(1) ** 2
    found = decode_square(*encode_square(square, 7))
    assert (found[square > 0] > 0).all()
    large = square > 0.01 * square.max()
    assert ((found - square).abs()[large] <= 0.07 * square[large]).all()


def test_a_slow_decay_of_the_mean_square_is_not_rounded_away() -> None:
    codes, scale = encode_square(torch.ones(4096), 0)
    square = decode_square(codes, scale)
    square[::64] = 4.0  # holds each group's scale, so that its neighbours have to move by codes
    for step in range(1, 500):
        square[1:] *= 0.999
        square[::64] = 4.0
        square = decode_square(*encode_square(square, step))
    mask = torch.arange(4096) % 64 != 0
    assert float(square[mask].mean()) == pytest.approx(0.999**499, rel=0.05)


@pytest.mark.parametrize("moments", [FULL, EIGHT_BIT])
def test_ranks_share_it_out_by_parameter_name_and_it_comes_back_whole(moments: str) -> None:
    def engine_of(p: torch.nn.Parameter, q: torch.nn.Parameter) -> SimpleNamespace:
        return SimpleNamespace(optimizer=AdamW([p, q], 1e-2, 0.1, 1.0, moments))

    def update(engine: SimpleNamespace, steps: range) -> None:
        for step in steps:
            for n, p in enumerate(engine.optimizer.param_groups[0]["params"]):
                p.grad = _grad(10 * step + n).to(p.dtype)
            engine.optimizer.step()

    def shares(engine: SimpleNamespace, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """What two ranks write, each its share, as whole tensors."""
        laid, flat = [], []
        for rank in range(2):
            buffer = HostBuffer()
            held = buffer.hold(local_parts(engine, parameters, DeviceMesh(rank, 2)))
            laid.append(layout(held))
            flat.append(buffer.first(num_bytes(laid[-1])))
        check_complete(laid)
        return assemble(laid, flat)

    first, second = ({name: _start(torch.bfloat16)[0] for name in ("a", "b")} for _ in range(2))
    engine = engine_of(*first.values())
    update(engine, range(4))
    saved = shares(engine, first)
    update(engine, range(4, 7))
    again = engine_of(*second.values())
    assert saved["weights.a"].dtype == torch.float32  # what export and evaluation read, whatever the optimizer
    read = lambda wanted: (saved[name].flatten()[lo:hi] for name, lo, hi in wanted)  # noqa: E731
    restore_parts(again, second, read, 4, DeviceMesh(0, 1))
    update(again, range(4, 7))
    wanted, found = shares(engine, first), shares(again, second)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(t, found[name]) for name, t in wanted.items())
    assert all(torch.equal(first[name], second[name]) for name in first)
