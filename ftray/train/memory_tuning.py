"""How many rows at once and how many layers recomputed: the fastest pair that fits the GPU's memory.

Measured: what a token's activations keep, by two short forward passes each way. Counted: weights, gradients, optimizer
states. All ranks take the same decision. Knows tensors and settings; nothing of engines or data.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ftray import config
from ftray.errors import ConfigError
from ftray.model.blocks import layers_of
from ftray.train.batch import Batch
from ftray.train.memory import MemoryChoice, MemoryModel, best_fit, gathered_bytes, head_of, longest_row, state_bytes
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.parallel import DeviceMesh
from ftray.train.zero.init import gathered_in_use

PROBE_TOKENS = (1024, 2048)


def fit_memory(
    run: config.RunConfig,
    loss: ObjectiveModel,
    mesh: DeviceMesh,
    before: int | None = None,
    documents: int = 1,
) -> MemoryChoice:
    """Chooses for a model on its device, before its engine is built, and sets the layers' recomputing. Collective.

    before: as in `best_fit`. documents: most of them in a row.

    Raises ConfigError where recomputing is asked of a model that has no layers for it.
    """
    layers = list(layers_of(loss.model).values())
    wanted = {"none": [0], "selective": [len(layers) // 2], "full": [len(layers)]}
    if not layers and run.train.gradient_checkpointing in ("selective", "full"):
        raise ConfigError(
            f"train.gradient_checkpointing {run.train.gradient_checkpointing}: this model has no layers for it; use none"
        )
    counts = wanted.get(run.train.gradient_checkpointing, list(range(len(layers) + 1)))
    per_rank = run.train.global_batch_size // mesh.data_size
    given = run.train.micro_batch_size
    rows = [n for n in range(1, per_rank + 1) if per_rank % n == 0] if given == "auto" else [given]
    if mesh.device.type == "cuda" and len(rows) * len(counts) > 1:
        memory = _measure(run, loss, layers, mesh)
        fit = best_fit(memory, rows, counts, longest_row(run, documents), before)
    else:
        fit = MemoryChoice(next((n for n in rows if n == before), rows[0]), counts[0], len(layers))
    _recompute(loss.model, layers, fit.layers)
    return fit


def _recompute(model: Any, layers: list[Any], count: int) -> None:
    """Sets `count` of the layers, evenly spread, to be recomputed in backward."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if count:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for n, layer in enumerate(layers):
        layer.gradient_checkpointing = (n + 1) * count // len(layers) > n * count // len(layers)


def _measure(run: config.RunConfig, loss: ObjectiveModel, layers: list[Any], mesh: DeviceMesh) -> MemoryModel:
    device = mesh.device
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
    sizes = [_numel(p) for p in parameters]
    states = state_bytes(run, sum(sizes), mesh.data_size, max(sizes, default=0))
    static = torch.cuda.memory_allocated(device) + states.lasting
    if is_cut:
        static += gathered_bytes(run, sum(_numel(p) for p in loss.parameters()))
    free, whole = torch.cuda.mem_get_info(device)
    capacity = min(free + torch.cuda.memory_reserved(device), whole * run.scale.gpus_per_worker)
    capacity, static, kept, recomputed = mesh.max([-capacity, static, *token_bytes])
    hidden = width * (4 if run.train.precision == "fp32" else 2)
    at_head = head_of(run, vocabulary, width, head.requires_grad, loss.head is not None)
    return MemoryModel(-capacity, static, kept, recomputed, len(layers), hidden, at_head, states.update)


def _kept(loss: ObjectiveModel, num_tokens: int, vocabulary: int, device: torch.device) -> int:
    """Bytes that a forward pass over that many tokens leaves for backward."""
    ids = torch.randint(vocabulary, (1, num_tokens), device=device)
    positions = torch.arange(num_tokens, device=device)[None]
    ends = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    before = torch.cuda.memory_allocated(device)
    out = loss(Batch(ids, ids, positions, ends, num_tokens))
    kept = torch.cuda.memory_allocated(device) - before
    del out
    return kept


def _numel(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
