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


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end without their padding: int64 [1, tokens] each; positions restart at 0 in each document."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor


def flatten_rows(
    input_ids: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
    position_ids: npt.NDArray[np.int32],
    num_tokens: npt.NDArray[np.int32],
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Rows [rows, max_seq_len] → one MicroBatch; num_tokens: tokens of each row before its padding."""

    def flat(matrix: npt.NDArray[np.int32]) -> torch.Tensor:
        tokens = np.concatenate([row[:n] for row, n in zip(matrix, num_tokens, strict=True)])
        return torch.from_numpy(tokens.astype(np.int64))[None].to(device)

    return MicroBatch(flat(input_ids), flat(labels), flat(position_ids))


class SummedLoss(torch.nn.Module):
    """A causal language model whose forward is the summed cross-entropy of a MicroBatch, float32 scalar.

    Logits are computed for supervised positions only, in float32. Attention stays inside each document: with no mask
    and no cache, transformers builds a block-diagonal causal mask from positions that restart (`tests/unit` holds it to
    that).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """input_ids, labels, position_ids: int64 [1, tokens]."""
        supervised = (labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=supervised
        ).logits[0]
        return torch.nn.functional.cross_entropy(logits.float(), labels[0, supervised], reduction="sum")
