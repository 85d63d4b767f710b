"""How many rows at once and how many layers recomputed: the fastest pair that fits the GPU's memory.

Measured: what a token's activations keep, by two short forward passes each way. Counted: weights, gradients, optimizer
states. All ranks take the same decision. Knows tensors and settings; nothing of engines or data.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ftray import config
from ftray.errors import ConfigError
from ftray.train.adamw import EIGHT_BIT, PAGED
from ftray.train.loss import MicroBatch, SummedLoss, piece_tokens
from ftray.train.partition import gathered_in_use
from ftray.train.zero import owns_optimizer

PROBE_TOKENS = (1024, 2048)
RECOMPUTE_COST = 0.33  # of a step's time, for recomputing every layer: a forward pass of three
SMALL_BATCH_TOKENS = 350  # a micro-batch costs as if it had this many tokens more
RESERVE = 0.05  # of the memory, for fragments and what is not modelled
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. capacity: what may be used; static: weights, gradients, optimizer states, the head's pieces.

    kept, recomputed: a token's activations when all layers keep theirs, and when none does.
    """

    capacity: float
    static: float
    kept: float
    recomputed: float
    num_layers: int

    def peak(self, tokens: int, layers: int) -> float:
        """Bytes with `layers` of the layers recomputed: what is kept, and one layer at work."""
        share = layers / max(1, self.num_layers)
        token = self.kept * (1 - share) + self.recomputed * share
        at_work = 2 * (self.kept - self.recomputed) / max(1, self.num_layers)
        return self.static + tokens * (token + at_work)


@dataclass(frozen=True)
class Fit:
    """What was chosen. layers: recomputed ones; peak: bytes expected, None where nothing was measured."""

    micro_batch_size: int
    layers: int
    num_layers: int
    peak: float | None = None


def best_fit(memory: Memory, rows: list[int], layers: list[int], seq: int, before: int | None = None) -> Fit:
    """The fastest of rows × layers by a model of time; the smallest if none fits.

    rows: possible micro-batch sizes; layers: possible numbers of recomputed layers; seq: tokens of a row. before: the
    rows that the run was begun with, which are kept if they fit: dropout's masks hang on them.
    """

    def cost(pair: tuple[int, int]) -> float:
        share = pair[1] / max(1, memory.num_layers)
        return (1 + RECOMPUTE_COST * share) * (1 + SMALL_BATCH_TOKENS / (pair[0] * seq))

    pairs = [(n, k) for n in rows for k in layers]
    limit = memory.capacity * (1 - RESERVE)
    fitting = [pair for pair in pairs if memory.peak(pair[0] * seq, pair[1]) <= limit]
    kept = [pair for pair in fitting if pair[0] == before]
    chosen = min(kept or fitting, key=cost) if fitting else (min(rows), max(layers))
    return Fit(*chosen, memory.num_layers, memory.peak(chosen[0] * seq, chosen[1]))


def fit_memory(
    run: config.Run, loss: SummedLoss, device: torch.device, world_size: int, before: int | None = None
) -> Fit:
    """Chooses for a model on its device, before its engine is built, and sets the layers' recomputing. Collective.

    before: as in `best_fit`.

    Raises ConfigError where recomputing is asked of a model that has no layers for it.
    """
    layers = _layers(loss.model)
    wanted = {"none": [0], "selective": [len(layers) // 2], "full": [len(layers)]}
    if not layers and run.train.recompute in ("selective", "full"):
        raise ConfigError(f"train.recompute {run.train.recompute}: this model has no layers for it; use none")
    counts = wanted.get(run.train.recompute, list(range(len(layers) + 1)))
    per_rank = run.train.global_batch_size // world_size
    given = run.train.micro_batch_size
    rows = [n for n in range(1, per_rank + 1) if per_rank % n == 0] if given == "auto" else [given]
    if device.type == "cuda" and len(rows) * len(counts) > 1:
        memory = _measure(run, loss, layers, device, world_size)
        fit = best_fit(memory, rows, counts, run.data.max_seq_len, before)
    else:
        fit = Fit(next((n for n in rows if n == before), rows[0]), counts[0], len(layers))
    _recompute(loss.model, layers, fit.layers)
    return fit


def _layers(model: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _recompute(model: Any, layers: list[Any], count: int) -> None:
    """Sets `count` of the layers, evenly spread, to be recomputed in backward."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if count:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for n, layer in enumerate(layers):
        layer.gradient_checkpointing = (n + 1) * count // len(layers) > n * count // len(layers)


def _measure(run: config.Run, loss: SummedLoss, layers: list[Any], device: torch.device, world_size: int) -> Memory:
    parameters = [p for p in loss.parameters() if p.requires_grad]
    head = loss.model.get_output_embeddings().weight
    vocabulary, width = getattr(head, "ds_shape", head.shape)
    token_bytes = []
    is_cut = run.deepspeed.zero_stage == 3
    with gathered_in_use(loss, layers) if is_cut else nullcontext():
        for count in (0, len(layers)):
            _recompute(loss.model, layers, count)
            small, large = (_kept(loss, n, vocabulary, device) for n in PROBE_TOKENS)
            token_bytes.append((large - small) / (PROBE_TOKENS[1] - PROBE_TOKENS[0]))
    torch.cuda.empty_cache()
    pieces = 2 * vocabulary * piece_tokens(vocabulary) + (4 * vocabulary * width if head.requires_grad else 0)
    static = torch.cuda.memory_allocated(device) + pieces + state_bytes(run, parameters, world_size)
    if is_cut:
        static += gathered_bytes(run, loss)
    free, whole = torch.cuda.mem_get_info(device)
    capacity = min(free + torch.cuda.memory_reserved(device), whole * run.scale.gpus_per_worker)
    worst = torch.tensor([-capacity, static, *token_bytes], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    capacity, static, kept, recomputed = (float(v) for v in worst)
    return Memory(-capacity, static, kept, recomputed, len(layers))


def _kept(loss: SummedLoss, num_tokens: int, vocabulary: int, device: torch.device) -> int:
    """Bytes that a forward pass over that many tokens leaves for backward."""
    ids = torch.randint(vocabulary, (1, num_tokens), device=device)
    positions = torch.arange(num_tokens, device=device)[None]
    ends = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    before = torch.cuda.memory_allocated(device)
    out = loss(*vars(MicroBatch(ids, ids, positions, ends, num_tokens)).values())
    kept = torch.cuda.memory_allocated(device) - before
    del out
    return kept


def state_bytes(run: config.Run, parameters: list[torch.nn.Parameter], world_size: int) -> float:
    """Gradients, masters and moments of the trained parameters on one GPU, and what the update needs besides."""
    number = sum(_numel(p) for p in parameters)
    own = 2 if run.train.precision == "bf16" else 4
    if owns_optimizer(run.train, run.deepspeed):
        moments = 2.2 if run.train.optimizer.removesuffix(PAGED) == EIGHT_BIT else 8.0
        # Paged ones come for one parameter at a time, and go.
        near = max(map(_numel, parameters), default=0) if run.train.optimizer.endswith(PAGED) else number
        return number * (own + (2 if own == 2 else 0)) + near * moments
    sharded = 12 / world_size
    gradients = own / (world_size if run.deepspeed.zero_stage > 1 else 1)
    update = (own + 4) / world_size  # flat gradients, and the same in fp32
    return number * (sharded + gradients + update) + min(2 * number * own, 2 * GIB)


def gathered_bytes(run: config.Run, loss: torch.nn.Module) -> float:
    """Weights that ZeRO-3 keeps whole on a GPU at once, and those under way."""
    zero = run.deepspeed.overrides.get("zero_optimization", {})
    most = float(zero.get("stage3_max_live_parameters", 1e9)) + float(zero.get("stage3_prefetch_bucket_size", 5e7))
    number = sum(_numel(p) for p in loss.parameters())
    return min(number, most) * (4 if run.train.precision == "fp32" else 2)


def _numel(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
