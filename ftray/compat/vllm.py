"""One correction inside of vLLM's worker processes, for CPU builds.

Their LoRA kernels index weights by each token's slot, and a token of the base has slot -1: Python then takes the last
slot's adapter (seen in 0.32). Here such rows shrink to zeros, which expand to nothing. vLLM imports this by its name.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

_plain = lora_ops.bgmv_shrink


def _bgmv_shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
    _plain(inputs, weights, output, indices, scaling)
    output[: indices.shape[0]][indices < 0] = 0


class CpuLoraFix:
    """Adds nothing to a worker: importing this module is what matters."""


lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = _bgmv_shrink
