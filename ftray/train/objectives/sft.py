"""Supervised fine-tuning: cross-entropy of the trained tokens, as a sum and their number.

The eval loss is the same sum.
"""

from __future__ import annotations

from typing import Any, Self

import torch

from ftray import config
from ftray.data.packing import IGNORE_INDEX
from ftray.train.batch import Batch
from ftray.train.memory import piece_tokens
from ftray.train.objectives.base import Objective, ObjectiveModel, register


@register
class Sft(Objective):
    """Summed cross-entropy of the trained tokens.

    Logits are computed for trained tokens only, and in pieces where the output head allows it (`base.is_plain`).

    Args:
        label_smoothing: Share of the target's weight that is spread over the vocabulary, in training mode only.
    """

    name = "sft"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self._label_smoothing = label_smoothing

    @classmethod
    def from_config(cls, run: config.RunConfig) -> Self:
        """The objective with `train.label_smoothing`."""
        return cls(run.train.label_smoothing)

    def build_head(self, causal: Any) -> LossHead:
        """The output head with the loss."""
        return LossHead(causal.get_output_embeddings())

    def loss(self, model: ObjectiveModel, batch: Batch) -> tuple[torch.Tensor, float]:
        """(summed cross-entropy, number of trained tokens)."""
        batch = self.prepare(model, batch)
        trained, targets = _trained_tokens(batch)
        smoothing = self._label_smoothing if model.training else 0.0
        if model.head is not None:
            loss: torch.Tensor = model.head(model.hidden(batch, trained), targets, smoothing)
        else:
            loss = _cross_entropy(model.logits(batch, trained).float(), targets, smoothing).sum()
        return loss, float(len(targets))

    def prepare(self, model: ObjectiveModel, batch: Batch) -> Batch:
        """The batch as the model sees it."""
        del model
        return batch

    @torch.no_grad()
    def token_scores(self, model: ObjectiveModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of each trained token, in order; the sum of the losses is `loss` without label smoothing.

        Returns:
            Cross-entropy, float32 [n]; whether the target has the highest logit, bool [n].
        """
        batch = self.prepare(model, batch)
        trained, targets = _trained_tokens(batch)
        if model.head is not None:
            weight: torch.Tensor = model.head.weight
            size = piece_tokens(len(weight))
            pieces = (piece @ weight.T for piece in model.hidden(batch, trained).split(size))
        else:
            size = max(1, len(targets))
            pieces = (logits for logits in [model.logits(batch, trained)])
        losses, hits = [], []
        for logits, wanted in zip(pieces, targets.split(size), strict=True):
            losses.append(_cross_entropy(logits.float(), wanted))
            hits.append(logits.argmax(dim=-1) == wanted)
        return torch.cat(losses), torch.cat(hits)


def _trained_tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions of the trained tokens, their targets), int64 [n] each."""
    trained = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
    return trained, batch.labels[0, trained]


class LossHead(torch.nn.Module):
    """The output head and its loss as one module with the head's own weight, so that ZeRO-3 gathers it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Summed cross-entropy, scalar float32, of hidden [tokens, width] against targets [tokens]."""
        loss: torch.Tensor
        if torch.is_grad_enabled():
            loss = LinearCrossEntropy.apply(hidden, self.weight, targets, smoothing)
            return loss
        size = piece_tokens(len(self.weight))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for piece, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            logits = (piece @ self.weight.T).float()
            loss += _cross_entropy(logits, wanted, smoothing).sum()
        return loss


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden @ weight.T, in pieces, so that the logits are never all in memory.

    Gradients are computed in the forward pass, where each piece's logits are available; the weight's gradient is summed in
    fp32 over the pieces.

    Args:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        targets: int64 [tokens].
        smoothing: Share of the target's weight that is spread over the vocabulary.

    Source:
        Hsu et al. 2024, Liger Kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
    ) -> torch.Tensor:
        """Scalar float32."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        size = piece_tokens(len(weight))
        for lo in range(0, len(hidden), size):
            piece = hidden[lo : lo + size]
            slope, losses = _slope(piece @ weight.T, targets[lo : lo + size], smoothing)
            total += losses.sum()
            torch.mm(slope, weight, out=grad_hidden[lo : lo + size])
            if weight.requires_grad:
                grad_weight = _add_product(grad_weight, slope.T, piece)
        if weight.requires_grad and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight if grad_weight is not None else torch.empty(0))
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        """grad: scalar. The gradients are scaled in place, so this may be called once."""
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight.numel():
            scaled = torch.empty_like(grad_weight, dtype=ctx.dtype)
            return grad_hidden.mul_(grad), torch.mul(grad_weight, grad, out=scaled), None, None
        return grad_hidden.mul_(grad), None, None, None


def _slope(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the summed cross-entropy with respect to logits, losses fp32 [tokens]); logits are overwritten."""
    if logits.is_cuda and not smoothing:
        from ftray.train.objectives.loss_kernels import softmax_slope_

        losses = softmax_slope_(logits, targets)
        return logits, losses
    wide = logits.float()
    norm = torch.logsumexp(wide, dim=-1, keepdim=True)
    losses = (norm - (1 - smoothing) * wide.gather(1, targets[:, None]))[:, 0]
    if smoothing:
        losses = losses - smoothing * wide.mean(dim=1)
    slope = wide.sub_(norm).exp_()  # softmax, in place
    if smoothing:
        slope -= smoothing / logits.shape[1]
    slope.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], smoothing - 1.0, dtype=torch.float32))
    return slope.to(logits.dtype), losses


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy float32 [tokens] of float32 logits [tokens, vocabulary]; differentiable."""
    if logits.is_cuda:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    # On CPUs with AVX2 torch's log-softmax of 49,152 float32 logits is off by 1.5e-5; its logsumexp is not.
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    losses = (norm - (1 - smoothing) * logits.gather(1, targets[:, None]))[:, 0]
    if smoothing:
        losses = losses - smoothing * logits.mean(dim=1)
    return losses


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in fp32, in place; the matrix unit accumulates in fp32 whatever a and b are."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    product = a.float() @ b.float()
    return product if total is None else total.add_(product)
