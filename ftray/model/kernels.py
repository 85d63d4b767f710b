"""Fused kernels where a package for them is installed: RMSNorm, RoPE and SwiGLU by Liger, on GPUs.

Equal to eager within bf16 rounding (`tests/gpu`). The loss is ours (`train/objectives/sft.py`), so Liger's is left out.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def apply_kernels(model_type: str) -> bool:
    """Replaces a family's modules by fused ones before a model is built; False where there are none. Whole process."""
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import monkey_patch

    apply: Any = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if apply is None:
        return False
    apply(cross_entropy=False, fused_linear_cross_entropy=False)
    return True
