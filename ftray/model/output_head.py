"""Whether a causal model's logits are its last hidden states times the output embedding, and nothing else.

transformers has no mark for it, and models scale, cap or cut logits by settings of many names, so that the class's own source
is read: what it does between hidden states and logits must be among the few lines that are known.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

STATES = re.compile(r"hidden_states = \w+(\.last_hidden_state|\[0\])")
LOGITS = re.compile(r"logits = self\.(\w+)\(hidden_states\[:, slice_indices, :\]\)(\.contiguous\(\)|\.float\(\))?")
CAP = re.compile(r"logits = (torch\.tanh\(logits\)|logits [/*] (self\.config\.)?final_logit_softcapping)")
TOUCHED = re.compile(r"(logits|hidden_states)\b(?!=)")  # not `logits=logits`, an argument


def is_plain(causal: Any) -> bool:
    """True only where it is known: no adapter, bias, scale, cap or anything new."""
    head = causal.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    if causal.get_decoder() is causal:  # a class that doesn't tell its blocks from the whole
        return False
    try:
        source = inspect.getsource(type(causal).forward)
    except (OSError, TypeError):
        return False
    is_capped = bool(getattr(causal.config.get_text_config(), "final_logit_softcapping", None))
    products = []
    for line in source.splitlines():
        text = line.split("#")[0].strip()
        if not TOUCHED.match(text) or STATES.fullmatch(text):
            continue
        if found := LOGITS.fullmatch(text):
            products.append(getattr(causal, found[1], None))
        elif is_capped or not CAP.fullmatch(text):
            return False
    return len(products) == 1 and products[0] is head
