"""Prompt tuning over packed sequences: trained embeddings in front of every document (Lester et al. 2021).

PEFT puts them once in front of a sequence and ignores positions, which is right for one document per sequence only.
"""

from __future__ import annotations

import torch

from ftray.data.packing import IGNORE_INDEX
from ftray.train.batch import Batch
from ftray.train.objectives.base import ObjectiveModel, register
from ftray.train.objectives.sft import Sft


@register
class PromptTuning(Sft):
    """The loss of `Sft` with the model's prompt in front of every document. Needs a PEFT prompt-tuning model."""

    name = "prompt-tuning"

    def prepare(self, model: ObjectiveModel, batch: Batch) -> Batch:
        """The batch with embeddings in place of token ids."""
        embeds = model.causal.get_input_embeddings()(batch.input_ids)
        return prepend_prompt(model.model.get_prompt(batch_size=1), embeds, batch)


def prepend_prompt(prompt: torch.Tensor, embeds: torch.Tensor, batch: Batch) -> Batch:
    """A batch whose documents each begin with the prompt; its length grows by documents · prompt tokens.

    The prompt is not trained on: the label of its last token would be the document's first token, which nothing predicts.

    Args:
        prompt: [1, prompt tokens, width].
        embeds: [1, tokens, width], the embeddings of the batch's tokens.
        batch: Packed sequences.
    """
    cu_seqlens, labels = batch.cu_seqlens, batch.labels
    num_prompt, num_documents = prompt.shape[1], len(cu_seqlens) - 1
    at = torch.arange(embeds.shape[1], device=embeds.device)
    document = torch.bucketize(at, cu_seqlens[1:].long(), right=True)
    tokens = at + (document + 1) * num_prompt  # where each token goes
    longer = (cu_seqlens + torch.arange(num_documents + 1, device=cu_seqlens.device) * num_prompt).to(torch.int32)
    starts = longer[:-1].long()
    prompts = (starts[:, None] + torch.arange(num_prompt, device=embeds.device)).flatten()
    total = embeds.shape[1] + num_documents * num_prompt
    # Two copies to disjoint positions, so that the gradient of the repeated prompt is a plain, deterministic sum.
    out = embeds.new_zeros(total, embeds.shape[2]).index_copy(0, tokens, embeds[0])
    out = out.index_copy(0, prompts, prompt[0].to(embeds.dtype).repeat(num_documents, 1))
    targets = labels.new_full((total,), IGNORE_INDEX).index_copy(0, tokens, labels[0])
    lengths = longer.diff().long()
    positions = torch.arange(total, device=embeds.device) - starts.repeat_interleave(lengths, output_size=total)
    return Batch(
        batch.input_ids, targets[None], positions[None], longer, batch.max_length + num_prompt, inputs_embeds=out[None]
    )
