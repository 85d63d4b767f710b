"""Whether a causal model's logits are its last hidden states times the output embedding, and nothing else.

Models scale, cap, shift or cut their logits by settings of many names. So the class's own forward is tried: with random
hidden states in place of the decoder's, and a small random weight in place of the head's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

TOKENS, ROWS = 3, 8  # of the trial: hidden states, rows of the stand-in weight
TOLERANCE = 1e-5


def is_plain(causal: Any) -> bool:
    """True only if the logits are the plain product: no adapter, bias, scale, cap or cut."""
    head = causal.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    decoder = causal.get_decoder()
    if decoder is causal:  # a class that does not separate its blocks from the whole
        return False
    rows = getattr(head.weight, "ds_shape", head.weight.shape)[0]
    if rows != causal.config.get_text_config().vocab_size:  # logits might be cut to the vocabulary
        return False
    from transformers.modeling_outputs import MoeModelOutputWithPast

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, head.in_features, generator=generator)
    weight = torch.randn(ROWS, head.in_features, generator=generator)
    wanted = hidden @ weight.T

    def decode(*_: Any, **__: Any) -> Any:
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    def project(states: torch.Tensor) -> torch.Tensor:
        return states @ weight.T

    try:
        with torch.no_grad(), _replaced(decoder, decode), _replaced(head, project):
            logits = causal(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False).logits
            return logits.shape == wanted.shape and torch.allclose(logits.float(), wanted, rtol=TOLERANCE)
    except Exception:  # noqa: BLE001 - a forward that needs more than hidden states is not plain
        return False


@contextmanager
def _replaced(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    """Inside, a module computes something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
