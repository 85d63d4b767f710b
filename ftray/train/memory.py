"""The memory model of training on a GPU: states by optimizer and ZeRO stage, activations by sequences and layers.

`memory_tuning` fills it with measurements on the GPU, `report.plan` with estimates from a model's shape. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftray import config
from ftray.train.zero.config import owns_optimizer, size_of

EIGHT_BIT = "adamw-8bit"
PAGED = "-paged"  # suffix of an optimizer's name: moments are in host memory
PIECE_LOGITS = 2**29  # logits in memory at once
HIDDEN_AT_HEAD = 2.6  # hidden states in memory at the head: their gradient, the last norm's (measured)
LAYER_AT_WORK = (
    1.2  # activations and gradients of a checkpointed layer in backward, over those it keeps otherwise (measured)
)
LAYER_IN_BACKWARD = 0.2  # the same for a layer that kept its activations: only gradients are added
CHECKPOINTING_COST = 0.33  # of a step's time with all layers checkpointed: one more forward pass on three
SMALL_BATCH_TOKENS = 350  # fixed cost of a micro-batch, in tokens
RESERVE = 0.05  # of the memory, for fragmentation and everything that is not modeled
GIB = 2**30


@dataclass(frozen=True)
class HeadMemory:
    """Bytes at the output head.

    Attributes:
        fixed: Independent of the number of tokens.
        token: Of a token's logits.
        at_once: Tokens whose logits are in memory at once.
    """

    fixed: float
    token: float
    at_once: float

    def bytes(self, tokens: int) -> float:
        """Bytes for a micro-batch with this number of tokens."""
        return self.fixed + self.token * min(tokens, self.at_once)


@dataclass(frozen=True)
class MemoryModel:
    """Bytes on one GPU.

    Attributes:
        capacity: Usable memory.
        static: Weights, gradients, optimizer states.
        kept: A token's activations if no layer is checkpointed.
        recomputed: A token's activations if all layers are checkpointed.
        num_layers: Layers of the model.
        hidden: A token's hidden state.
        head: Memory at the output head.
        update: Extra memory of the optimizer's step, when activations are freed.
    """

    capacity: float
    static: float
    kept: float
    recomputed: float
    num_layers: int
    hidden: float
    head: HeadMemory
    update: float = 0.0

    def activations(self, tokens: int, layers: int) -> float:
        """Bytes kept for backward with `layers` of the layers checkpointed."""
        share = layers / max(1, self.num_layers)
        return tokens * (self.kept * (1 - share) + self.recomputed * share)

    def working(self, tokens: int, layers: int) -> float:
        """Further bytes at the peak, which is at the head or in the last layer's backward, before anything is freed."""
        layer = (self.kept - self.recomputed) / max(1, self.num_layers)
        in_backward = tokens * layer * (LAYER_AT_WORK if layers else LAYER_IN_BACKWARD)
        return max(self.head.bytes(tokens) + tokens * self.hidden * HIDDEN_AT_HEAD, in_backward)

    def peak(self, tokens: int, layers: int) -> float:
        """Peak bytes of a step with `layers` of the layers checkpointed."""
        return self.static + max(self.activations(tokens, layers) + self.working(tokens, layers), self.update)


@dataclass(frozen=True)
class MemoryChoice:
    """The chosen memory settings.

    Attributes:
        micro_batch_size: Packed sequences per forward pass.
        layers: Layers with gradient checkpointing.
        num_layers: Layers of the model.
        peak: Expected peak in bytes; None if nothing was measured.
    """

    micro_batch_size: int
    layers: int
    num_layers: int
    peak: float | None = None


def best_fit(
    memory: MemoryModel, sizes: list[int], layers: list[int], seq: int, before: int | None = None
) -> MemoryChoice:
    """The fastest combination of micro-batch size and checkpointed layers that fits; the smallest if none fits.

    Args:
        memory: The memory model.
        sizes: Possible micro-batch sizes.
        layers: Possible numbers of checkpointed layers.
        seq: Tokens of a packed sequence.
        before: Micro-batch size that the run started with; it is kept if it fits, because dropout masks depend on it.
    """

    def cost(pair: tuple[int, int]) -> float:
        share = pair[1] / max(1, memory.num_layers)
        return (1 + CHECKPOINTING_COST * share) * (1 + SMALL_BATCH_TOKENS / (pair[0] * seq))

    pairs = [(n, k) for n in sizes for k in layers]
    limit = memory.capacity * (1 - RESERVE)
    fitting = [pair for pair in pairs if memory.peak(pair[0] * seq, pair[1]) <= limit]
    kept = [pair for pair in fitting if pair[0] == before]
    chosen = min(kept or fitting, key=cost) if fitting else (min(sizes), max(layers))
    return MemoryChoice(*chosen, memory.num_layers, memory.peak(chosen[0] * seq, chosen[1]))


def max_sequence_tokens(run: config.RunConfig, documents: int) -> int:
    """Most tokens of a packed sequence with this number of documents; prompt tuning adds its prompt to each."""
    return run.data.max_seq_len + (
        run.method.num_virtual_tokens * documents if run.method.type == "prompt-tuning" else 0
    )


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one GPU besides weights and activations.

    Attributes:
        gradients: Gradients.
        optimizer: Master weights and moments.
        bucket: Buffer in which gradients are summed over ranks.
        update: Only during the optimizer's step.
    """

    gradients: float
    optimizer: float
    bucket: float
    update: float

    @property
    def lasting(self) -> float:
        """Bytes that stay from step to step."""
        return self.gradients + self.optimizer + self.bucket


def state_bytes(run: config.RunConfig, number: int, world_size: int, largest: int) -> StateMemory:
    """Memory of the training state.

    Args:
        run: The run's configuration.
        number: Trained weights.
        world_size: Ranks that share the state.
        largest: Weights of the largest parameter; paged moments are on the GPU for one parameter at a time.
    """
    own = 4 if run.train.precision == "fp32" else 2
    if owns_optimizer(run.train, run.deepspeed):
        moments = 2.2 if run.train.optimizer.removesuffix(PAGED) == EIGHT_BIT else 8.0
        near = largest if run.train.optimizer.endswith(PAGED) else number
        return StateMemory(number * own, number * (2 if own == 2 else 0) + near * moments, 0.0, 0.0)
    gradients = own / (world_size if run.deepspeed.zero_stage > 1 else 1)
    update = (own + 4) / world_size  # flat gradients, and the same in fp32
    bucket = own * size_of(run.deepspeed, "reduce_bucket_size")
    if run.deepspeed.offload != "none":  # masters, moments and the step itself are on the host
        return StateMemory(number * gradients, 0.0, bucket, 0.0)
    return StateMemory(number * gradients, number * 12 / world_size, bucket, number * update)


def gathered_bytes(run: config.RunConfig, number: int) -> float:
    """Bytes of the weights that ZeRO-3 keeps gathered or prefetches on a GPU, of a model with `number` weights."""
    most = size_of(run.deepspeed, "stage3_max_live_parameters") + size_of(run.deepspeed, "stage3_prefetch_bucket_size")
    return min(number, most) * (4 if run.train.precision == "fp32" else 2)


def head_of(run: config.RunConfig, vocabulary: int, width: int, is_trained: bool, in_pieces: bool = True) -> HeadMemory:
    """Memory at the output head.

    In pieces: the logits of a piece of the tokens and their gradient; with label smoothing or in fp32 also their float32
    forms; for a trained head also its gradient's sum in fp32. Not in pieces: the logits of all tokens, in addition to the
    four bytes of each in the activations.
    """
    in_fp32 = run.train.precision == "fp32"
    if not in_pieces:
        return HeadMemory(0.0, 8.0 * vocabulary, math.inf)
    each = 12 if run.train.label_smoothing else 8 if in_fp32 else 4
    fixed = (8 if in_fp32 else 4) * vocabulary * width if is_trained else 0
    return HeadMemory(fixed, each * vocabulary, piece_tokens(vocabulary))


def piece_tokens(vocabulary: int) -> int:
    """Tokens whose logits are in memory at once: 4096 for a vocabulary of 128,256."""
    return max(256, PIECE_LOGITS // vocabulary // 256 * 256)
