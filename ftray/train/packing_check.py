"""Whether a model keeps the documents of a row apart: tried on the model itself, before it is trained.

A mask holds attention inside a document. A state that is carried along (Mamba, linear attention, RWKV), a class that
loses the documents' lengths on their way, or scores without a mask are nothing that a mask can help, and nothing that a
loss would show.
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
from ftray.model.blocks import layers_of
from ftray.train.batch import Batch
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.zero.init import gathered_in_use

NEIGHBORS, FIRST, SECOND = 5, 24, 3  # different documents in front; their tokens, and those of the one behind


def check_packing(run: config.RunConfig, loss: ObjectiveModel, device: torch.device) -> None:
    """Raises ModelError for a model whose documents depend on others of their row.

    Also without data.packing: a micro-batch's rows are laid end to end, and evaluation packs records whatever training does.
    Where ftray's own attention doesn't learn of the documents, transformers' is taken. Collective under ZeRO-3.
    """
    layers = list(layers_of(loss.model).values())
    causal, family = loss.causal, loss.family
    steady = steady_context(causal.config)
    if steady is not None and run.data.max_seq_len > steady:
        raise ModelError(
            f"data.max_seq_len ({run.data.max_seq_len}) is beyond {steady}, from where on the rotary frequencies of model.base "
            f"{run.model.base} are those of the longest document in a row; lower it to {steady}, or use another base"
        )
    limit = family.max_leak(causal.dtype == torch.float32)
    with gathered_in_use(loss, layers) if run.deepspeed.zero_stage == 3 else nullcontext():
        change = leak(loss, device)
        if change > limit and attention_of(causal.config) == VARLEN:
            causal.set_attn_implementation(family.packing_fallback)
            change = leak(loss, device)
    if change > limit:
        raise ModelError(
            f"model.base {run.model.base} ({causal.config.model_type}): a document changes the loss of the one behind it in "
            f"its row, by {change:.1%} in a trial; use another base"
        )


@torch.no_grad()
def leak(loss: ObjectiveModel, device: torch.device) -> float:
    """How much of a document's loss changes with the one in front of it, at most."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = loss.model.get_input_embeddings().weight
    size = int(getattr(vocabulary, "ds_shape", vocabulary.shape)[0])

    def tokens(number: int) -> torch.Tensor:
        return torch.randint(size, (number,), generator=generator)

    behind = tokens(SECOND)
    training = loss.training
    loss.eval()
    found = [float(loss(_pair(tokens(FIRST), behind, device))[0]) for _ in range(NEIGHBORS)]
    loss.train(training)
    share = (max(found) - min(found)) / max(min(found), 1e-9)
    return 0.0 if math.isnan(share) else share  # a model that gives no numbers is another matter


def _pair(first: torch.Tensor, second: torch.Tensor, device: torch.device) -> Batch:
    """Two documents in a row, of which only the second is supervised."""
    ids = torch.cat([first, second])[None]
    labels = torch.cat([torch.full_like(first, IGNORE_INDEX), second[1:], torch.tensor([IGNORE_INDEX])])[None]
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    begins = torch.tensor([0, len(first), len(first) + len(second)], dtype=torch.int32)
    ids, labels, positions, begins = (x.to(device) for x in (ids, labels, positions, begins))
    return Batch(ids, labels, positions, begins, len(first))
