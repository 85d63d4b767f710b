"""Chooses micro-batch size and gradient checkpointing: the fastest combination that fits the GPU's memory.

A token's activations are measured by short forward passes; weights, gradients and optimizer states are counted. All ranks take
the same decision.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ftray import config
from ftray.errors import ConfigError
from ftray.model.families.base import layers_of
from ftray.train.batch import Batch
from ftray.train.memory import (
    MemoryChoice,
    MemoryModel,
    best_fit,
    gathered_bytes,
    head_of,
    max_sequence_tokens,
    state_bytes,
)
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.parallel import DeviceMesh
from ftray.train.zero.init import gathered_in_use

PROBE_TOKENS = (1024, 2048)


def tune_memory(
    run: config.RunConfig,
    loss: ObjectiveModel,
    mesh: DeviceMesh,
    before: int | None = None,
    documents: int = 1,
) -> MemoryChoice:
    """Chooses the memory settings and applies gradient checkpointing to the model. Collective.

    Args:
        run: The run's configuration.
        loss: The model on its device, before its engine is built.
        mesh: This rank's place.
        before: As in `best_fit`.
        documents: Most documents of a packed sequence.

    Raises:
        ConfigError: Gradient checkpointing is set, but the model has no layers that support it.
    """
    layers = list(layers_of(loss.model).values())
    options = {"none": [0], "selective": [len(layers) // 2], "full": [len(layers)]}
    if not layers and run.train.gradient_checkpointing in ("selective", "full"):
        raise ConfigError(
            f"train.gradient_checkpointing {run.train.gradient_checkpointing}: this model has no layers that support it; use none"
        )
    counts = options.get(run.train.gradient_checkpointing, list(range(len(layers) + 1)))
    per_rank = run.train.global_batch_size // mesh.data_size
    setting = run.train.micro_batch_size
    sizes = [n for n in range(1, per_rank + 1) if per_rank % n == 0] if setting == "auto" else [setting]
    if mesh.device.type == "cuda" and len(sizes) * len(counts) > 1:
        memory = _measure(run, loss, layers, mesh)
        choice = best_fit(memory, sizes, counts, max_sequence_tokens(run, documents), before)
    else:
        choice = MemoryChoice(next((n for n in sizes if n == before), sizes[0]), counts[0], len(layers))
    _set_checkpointing(loss.causal, layers, choice.layers)
    return choice


def _set_checkpointing(causal: Any, layers: list[Any], count: int) -> None:
    """Sets gradient checkpointing for `count` of the layers, evenly spread."""
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
    is_sharded = run.deepspeed.zero_stage == 3
    with gathered_in_use(loss, layers) if is_sharded else nullcontext():
        for count in (0, len(layers)):
            _set_checkpointing(loss.causal, layers, count)
            small, large = (_kept(loss, n, vocabulary, device) for n in PROBE_TOKENS)
            token_bytes.append((large - small) / (PROBE_TOKENS[1] - PROBE_TOKENS[0]))
    torch.cuda.empty_cache()
    sizes = [_numel(p) for p in parameters]
    states = state_bytes(run, sum(sizes), mesh.data_size, max(sizes, default=0))
    static = torch.cuda.memory_allocated(device) + states.lasting
    if is_sharded:
        static += gathered_bytes(run, sum(_numel(p) for p in loss.parameters()))
    free, whole = torch.cuda.mem_get_info(device)
    capacity = min(free + torch.cuda.memory_reserved(device), whole * run.scale.gpus_per_worker)
    capacity, static, kept, recomputed = mesh.max([-capacity, static, *token_bytes])
    hidden = width * (4 if run.train.precision == "fp32" else 2)
    at_head = head_of(run, vocabulary, width, head.requires_grad, loss.head is not None)
    return MemoryModel(-capacity, static, kept, recomputed, len(layers), hidden, at_head, states.update)


def _kept(loss: ObjectiveModel, num_tokens: int, vocabulary: int, device: torch.device) -> int:
    """Bytes that a forward pass over this number of tokens keeps for backward."""
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
