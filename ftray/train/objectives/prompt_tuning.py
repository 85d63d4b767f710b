"""Prompt tuning over packed rows: virtual tokens in front of every document. Knows tensors only.

PEFT puts them once in front of a row and ignores positions, which is right for one document a row only.
"""

from __future__ import annotations

import torch

from ftray.data.packing import IGNORE_INDEX


def prepend_virtual(
    prompt: torch.Tensor, embeds: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(embeds, labels, position_ids, cu_seqlens) of documents laid end to end, each with the prompt in front.

    prompt: [1, virtual, width]; embeds: [1, tokens, width]; labels: int64 [1, tokens]; cu_seqlens: int32
    [documents + 1]. Lengths grow by documents · virtual. Virtual tokens are not supervised: the last one's label would
    be a document's first token, which no document is asked for.
    """
    num_virtual, num_documents = prompt.shape[1], len(cu_seqlens) - 1
    at = torch.arange(embeds.shape[1], device=embeds.device)
    document = torch.bucketize(at, cu_seqlens[1:].long(), right=True)
    tokens = at + (document + 1) * num_virtual  # where each token goes
    longer = (cu_seqlens + torch.arange(num_documents + 1, device=cu_seqlens.device) * num_virtual).to(torch.int32)
    begins = longer[:-1].long()
    virtual = (begins[:, None] + torch.arange(num_virtual, device=embeds.device)).flatten()
    total = embeds.shape[1] + num_documents * num_virtual
    # Two copies to places that differ, so that the gradient of the repeated prompt is a plain, deterministic sum.
    out = embeds.new_zeros(total, embeds.shape[2]).index_copy(0, tokens, embeds[0])
    out = out.index_copy(0, virtual, prompt[0].to(embeds.dtype).repeat(num_documents, 1))
    targets = labels.new_full((total,), IGNORE_INDEX).index_copy(0, tokens, labels[0])
    lengths = longer.diff().long()
    positions = torch.arange(total, device=embeds.device) - begins.repeat_interleave(lengths, output_size=total)
    return out[None], targets[None], positions[None], longer
