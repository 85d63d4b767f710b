"""The packing check: whether documents of a packed sequence influence each other, tried on the model before training.

A mask keeps attention inside a document. It cannot help with a recurrent state (Mamba, linear attention, RWKV), a class that
drops the documents' lengths, or scores without a mask, and a loss would not show any of these.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from ftray import config
from ftray.compat.transformers import attention_of
from ftray.data.packing import IGNORE_INDEX
from ftray.engine.rope import steady_context
from ftray.errors import ModelError
from ftray.model.attention import VARLEN
from ftray.model.families.base import layers_of
from ftray.train.batch import Batch
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.zero.init import gathered_in_use

NEIGHBORS, FIRST, SECOND = 5, 24, 3  # different first documents; tokens of the first and of the second


def check_packing(run: config.RunConfig, loss: ObjectiveModel, device: torch.device) -> None:
    """Raises ModelError for a model whose documents influence others of their packed sequence. Collective under ZeRO-3.

    Applies without data.packing, too: the sequences of a micro-batch are laid end to end, and evaluation always packs. If
    ftray's own attention does not get the documents' lengths, the family's fallback is used.
    """
    layers = list(layers_of(loss.model).values())
    causal, family = loss.causal, loss.family
    steady = steady_context(causal.config)
    if steady is not None and run.data.max_seq_len > steady:
        raise ModelError(
            f"data.max_seq_len ({run.data.max_seq_len}) is above {steady}. Beyond that, the RoPE frequencies of model.base "
            f"{run.model.base} depend on the longest document of a packed sequence. Lower it to {steady}, or use another base"
        )
    limit = family.max_leak(causal.dtype == torch.float32)
    with gathered_in_use(loss, layers) if run.deepspeed.zero_stage == 3 else nullcontext():
        change = leak(loss, device)
        if change > limit and attention_of(causal.config) == VARLEN:
            causal.set_attn_implementation(family.packing_fallback)
            change = leak(loss, device)
    if change > limit:
        raise ModelError(
            f"model.base {run.model.base} ({causal.config.model_type}) cannot be packed: a document changes the loss of the "
            f"next one by {change:.1%} in a trial. Use another base"
        )


@torch.no_grad()
def leak(loss: ObjectiveModel, device: torch.device) -> float:
    """The largest relative change of a document's loss with the document in front of it."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = loss.model.get_input_embeddings().weight
    size = int(getattr(vocabulary, "ds_shape", vocabulary.shape)[0])

    def tokens(number: int) -> torch.Tensor:
        return torch.randint(size, (number,), generator=generator)

    second = tokens(SECOND)
    training = loss.training
    loss.eval()
    losses = [float(loss(_pair(tokens(FIRST), second, device))[0]) for _ in range(NEIGHBORS)]
    loss.train(training)
    share = (max(losses) - min(losses)) / max(min(losses), 1e-9)
    return 0.0 if math.isnan(share) else share  # non-finite losses are reported elsewhere


def _pair(first: torch.Tensor, second: torch.Tensor, device: torch.device) -> Batch:
    """Two documents in a packed sequence; only the second is trained on."""
    ids = torch.cat([first, second])[None]
    labels = torch.cat([torch.full_like(first, IGNORE_INDEX), second[1:], torch.tensor([IGNORE_INDEX])])[None]
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    begins = torch.tensor([0, len(first), len(first) + len(second)], dtype=torch.int32)
    ids, labels, positions, begins = (x.to(device) for x in (ids, labels, positions, begins))
    return Batch(ids, labels, positions, begins, len(first))
