"""GPU data sheets, and a model of training speed.

The constants were measured on an H200 (docs/benchmarks.md). Other GPUs are extrapolated by data sheet, which is not measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftray import config
from ftray.errors import ConfigError
from ftray.train.memory import CHECKPOINTING_COST, SMALL_BATCH_TOKENS

if TYPE_CHECKING:
    from ftray.report.model_shape import ModelShape

MEASURED = "H200"
MATMUL_SHARE = 0.697  # of the data sheet's dense rate that products reach
# Passes over a token's activations, for all that is not a product.
PASSES = {"full": 11.8, "lora": 18.3, "qlora": 18.3, "prompt-tuning": 18.3}
QLORA_COST = 1.012
# Of all products, where the feed-forward layers' are in 8 bits. int8 is Hopper's, where it gains little; A100's is not measured.
GAINS = {("lora", "fp8"): 1.58, ("lora", "int8"): 1.12, ("full", "fp8"): 1.2}
MEASURED_TOKENS = 16384  # of the micro-batches that these were measured with
FP32_COST = 8.0  # a guess: products without the tensor cores' 16-bit rate
NEEDED = {"fp8": (9, 0), "int8": (8, 0)}  # capability, as in `model.eight_bit`
HIDDEN_SHARE = 0.5  # of the gathering of sharded weights that overlaps with products
GATHER_S = (
    5.5e-12  # a byte of sharded weights, in each micro-batch, for its calls and what it takes from the products beside
)
BETWEEN_NODES = 5e9  # bytes a second for each GPU, a guess: it depends on the network
GPUS_A_NODE = 8


@dataclass(frozen=True)
class GpuSpec:
    """gib: usable; tflops: dense 16-bit products; bandwidth: bytes a second of its memory, link: to its neighbours.

    capability: of its matrix units, as CUDA counts.
    """

    name: str
    gib: float
    tflops: float
    bandwidth: float
    link: float
    capability: tuple[int, int]


CARDS = {
    card.name: card
    for card in (
        GpuSpec("L4", 22.0, 121, 0.30e12, 12e9, (8, 9)),
        GpuSpec("A10G", 22.0, 70, 0.60e12, 12e9, (8, 6)),
        GpuSpec("A100-40G", 39.4, 312, 1.56e12, 230e9, (8, 0)),
        GpuSpec("L40S", 44.4, 362, 0.86e12, 25e9, (8, 9)),
        GpuSpec("A100-80G", 79.2, 312, 2.04e12, 230e9, (8, 0)),
        GpuSpec("H100", 79.1, 989, 3.35e12, 350e9, (9, 0)),
        GpuSpec("H200", 139.0, 989, 4.80e12, 350e9, (9, 0)),
        GpuSpec("B200", 178.0, 2250, 8.00e12, 700e9, (10, 0)),
    )
}
ALIASES = {"A100": "A100-40G"}
_DEVICES = (  # what drivers call them, the first that fits; other makes of a card have other rates
    (r"\bB200\b", "B200"),
    (r"\bH200\b(?! NVL)", "H200"),
    (r"\bH100\b(?! (NVL|PCIe))", "H100"),
    (r"\bA100\b.*80GB", "A100-80G"),
    (r"\bA100\b.*40GB", "A100-40G"),
    (r"\bL40S\b", "L40S"),
    (r"\bA10G\b", "A10G"),
    (r"\bL4\b", "L4"),
)


def card_named(name: str, method: config.MethodConfig) -> GpuSpec:
    """The card of that name in the table. Raises ConfigError for one that isn't there, or lacks what the method needs."""
    name = ALIASES.get(name, name)
    if name not in CARDS:
        raise ConfigError(f"the card {name} is unknown; use --card with one of {', '.join(CARDS)}")
    if not does(CARDS[name], method):
        able = [card.name for card in CARDS.values() if does(card, method)]
        raise ConfigError(
            f"method.base_precision {method.base_precision} is not supported by {name}; remove it, or "
            f"use one of {', '.join(able)}"
        )
    return CARDS[name]


def check_accelerator(run: config.RunConfig) -> None:
    """Raises ConfigError if the requested GPU type does not support the method."""
    if run.scale.accelerator in (*CARDS, *ALIASES):
        card_named(run.scale.accelerator, run.method)


def does(card: GpuSpec, method: config.MethodConfig) -> bool:
    """Whether the GPU supports the method's matrix products."""
    return method.base_precision is None or card.capability >= NEEDED[method.base_precision]


def card_of(device: str) -> GpuSpec | None:
    """The GPU with this name in the driver, or None if it is not in the table."""
    return next((CARDS[name] for pattern, name in _DEVICES if re.search(pattern, device)), None)


def flops_a_token(shape: ModelShape, method: config.MethodConfig) -> float:
    """FLOPs per trained token: per weight 2 in forward, 2 for the input's gradient, 2 for its own (not if frozen).

    Recomputation (gradient checkpointing) and attention scores are not counted.
    """
    weights = shape.in_layers + shape.head
    if method.type == "full":
        return 6.0 * weights
    return 4.0 * weights + (6.0 * shape.num_trained(method) if method.type in ("lora", "qlora") else 0.0)


def mfu(shape: ModelShape, method: config.MethodConfig, card: GpuSpec, num_gpus: float, speed: float) -> float:
    """Model FLOPs utilization: `flops_a_token` × tokens per second, over the dense 16-bit rate of the data sheets."""
    return flops_a_token(shape, method) * speed / (num_gpus * card.tflops * 1e12)


def tokens_per_s(
    run: config.RunConfig, shape: ModelShape, card: GpuSpec, world_size: int, tokens: int, share: float
) -> float:
    """Tokens per second and GPU. tokens: per micro-batch. share: of layers with gradient checkpointing."""
    method = run.method
    frozen = 0 if method.type == "full" else 1
    weights = shape.in_layers + shape.head
    products_s = (6 - 2 * frozen) * weights / (card.tflops * 1e12 * MATMUL_SHARE)
    if method.base_precision is not None:
        products_s /= GAINS[method.type, method.base_precision]
    if run.train.precision == "fp32":
        products_s *= FP32_COST
    rest_s = PASSES[method.type] * shape.kept_bytes(run.train.precision) / card.bandwidth
    compute_s = (
        (products_s + rest_s) * (1 + CHECKPOINTING_COST * share) * (QLORA_COST if method.type == "qlora" else 1.0)
    )
    compute_s *= (1 + SMALL_BATCH_TOKENS / tokens) / (1 + SMALL_BATCH_TOKENS / MEASURED_TOKENS)
    step_tokens = run.train.global_batch_size * run.data.max_seq_len / world_size
    return 1 / (compute_s + _talk_s(run, shape, card, world_size, tokens, step_tokens))


def _talk_s(
    run: config.RunConfig, shape: ModelShape, card: GpuSpec, world_size: int, tokens: int, step_tokens: float
) -> float:
    """Communication time per token: gradients once per step, at stage 3 also weights per micro-batch."""
    if world_size == 1:
        return 0.0
    speed = card.link if world_size <= GPUS_A_NODE else BETWEEN_NODES
    others = (world_size - 1) / world_size
    gradients_s = 2 * others * 2 * shape.num_trained(run.method) / speed / step_tokens
    if run.deepspeed.zero_stage < 3:
        return gradients_s
    gathered_s = (HIDDEN_SHARE * 2 * others / speed + GATHER_S) * shape.weight_bytes(run.method, run.train.precision)
    return gradients_s + gathered_s / tokens
