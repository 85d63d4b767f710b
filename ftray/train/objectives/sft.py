"""The loss: a sum over supervised tokens, to be divided by their number in the global batch.

Knows tensors and causal language models; nothing of DeepSpeed, steps or files. Held-out loss is the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ftray.data.packing import IGNORE_INDEX
from ftray.model.output_head import is_plain
from ftray.train.memory import piece_tokens
from ftray.train.objectives.prompt_tuning import prepend_virtual


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end without their padding: int64 [1, tokens] each; positions restart at 0 in each document.

    cu_seqlens: int32 [documents + 1], where documents begin, and the end. max_length: tokens of the longest.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int


def flatten_rows(
    input_ids: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
    position_ids: npt.NDArray[np.int32],
    num_tokens: npt.NDArray[np.int32],
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Rows [rows, max_seq_len] → one MicroBatch; num_tokens: tokens of each row before its padding."""

    def flat(matrix: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        return np.concatenate([row[:n] for row, n in zip(matrix, num_tokens, strict=True)]).astype(np.int64)

    def send(array: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    positions = flat(position_ids)
    begins = np.append(np.flatnonzero(positions == 0), len(positions)).astype(np.int32)
    return MicroBatch(
        send(flat(input_ids)[None]),
        send(flat(labels)[None]),
        send(positions[None]),
        send(begins),
        int(np.diff(begins).max(initial=0)),
    )


class SummedLossModel(torch.nn.Module):
    """A causal language model whose forward is the summed cross-entropy of a MicroBatch, float32 scalar.

    Logits are computed for supervised positions only, a piece at a time where the head is plain (`in_pieces`). Attention
    stays inside each document: by cu_seqlens on a GPU; elsewhere, with no mask and no cache, transformers builds a
    block-diagonal causal mask from positions that restart (`tests/unit` holds it to that). A prompt-tuned model sees its
    virtual tokens in front of every document.

    label_smoothing: share of the target's weight that is spread over the vocabulary, in training mode only.
    """

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self._label_smoothing = model, label_smoothing
        self._is_prompt_tuned = hasattr(model, "prompt_encoder")
        self._causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = LossHead(self._causal.get_output_embeddings()) if is_plain(self._causal) else None

    @property
    def decoder(self) -> torch.nn.Module:
        """Embeddings and blocks, without the head."""
        found: torch.nn.Module = self._causal.get_decoder()
        return found

    @property
    def in_pieces(self) -> bool:
        """Whether logits are computed a piece of the tokens at a time."""
        return self.head is not None

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        """The fields of a MicroBatch."""
        inputs, supervised, targets = self._inputs(input_ids, labels, position_ids, cu_seqlens, max_length)
        smoothing = self._label_smoothing if self.training else 0.0
        if self.head is not None:
            loss: torch.Tensor = self.head(self._hidden(inputs, supervised), targets, smoothing)
            return loss
        logits = self._logits(inputs, supervised)
        return _cross_entropy(logits.float(), targets, smoothing).sum()

    @torch.no_grad()
    def token_scores(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropy float32, whether the target has the highest logit) of each supervised token, in order.

        Their sum is what `forward` gives, without label smoothing.
        """
        inputs, supervised, targets = self._inputs(*vars(batch).values())
        if self.head is not None:
            weight = self.head.weight
            size = piece_tokens(len(weight))
            pieces = (piece @ weight.T for piece in self._hidden(inputs, supervised).split(size))
        else:
            size = max(1, len(targets))
            pieces = (logits for logits in [self._logits(inputs, supervised)])
        losses, hits = [], []
        for logits, wanted in zip(pieces, targets.split(size), strict=True):
            losses.append(_cross_entropy(logits.float(), wanted))
            hits.append(logits.argmax(dim=-1) == wanted)
        return torch.cat(losses), torch.cat(hits)

    def _inputs(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_length: int,
    ) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        """(what the model is called with, places of supervised tokens in it, their targets)."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if self._is_prompt_tuned:
            embeds = self._causal.get_input_embeddings()(inputs.pop("input_ids"))
            longer = prepend_virtual(self.model.get_prompt(batch_size=1), embeds, labels, cu_seqlens)
            inputs["inputs_embeds"], labels, inputs["position_ids"], cu_seqlens = longer
            max_length += self.model.active_peft_config.num_virtual_tokens
        supervised = (labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        if input_ids.is_cuda:
            inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            inputs |= {"max_length_q": max_length, "max_length_k": max_length}
        return inputs, supervised, labels[0, supervised]

    def _hidden(self, inputs: dict[str, Any], supervised: torch.Tensor) -> torch.Tensor:
        """Last hidden states of the supervised tokens: [tokens, width]."""
        states: torch.Tensor = self.decoder(**inputs).last_hidden_state
        return states.squeeze(0).index_select(0, supervised)

    def _logits(self, inputs: dict[str, Any], supervised: torch.Tensor) -> torch.Tensor:
        whole = self._causal if self._is_prompt_tuned else self.model
        logits: torch.Tensor = whole(**inputs, logits_to_keep=supervised).logits[0]
        return logits


class LossHead(torch.nn.Module):
    """The output head and its loss as one module with the head's own weight, so that ZeRO-3 gathers this for it."""

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
    """Summed cross-entropy of hidden @ weight.T, in pieces, so that logits are never whole in memory.

    hidden: [tokens, width]; weight: [vocabulary, width]; targets: int64 [tokens]; smoothing: share of the target's
    weight spread over the vocabulary. Gradients are made in the forward pass, where each piece's logits are at hand (as in
    Hsu et al. 2024, Liger Kernel); the weight's in fp32 over pieces.
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
