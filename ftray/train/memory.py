"""What training keeps in a GPU's memory, by arithmetic: states by optimizer and stage, activations by rows and layers.

`fit` fills it in with what it measures on the GPU, `observe.plan` with what follows from a model's shape. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftray import config
from ftray.train.zero.config import owns_optimizer, size_of

EIGHT_BIT = "adamw-8bit"
PAGED = "-paged"  # behind an optimizer's name: moments live in the host's memory
PIECE_LOGITS = 2**29  # logits in memory at once
HIDDEN_AT_HEAD = 2.6  # hidden states under way while the head is at work: their gradient, the last norm's (measured)
LAYER_AT_WORK = 1.2  # a recomputed layer's activations and gradients under way, as shares of what one keeps (measured)
LAYER_IN_BACKWARD = 0.2  # the same of a layer that kept its activations: only the gradients come on top
RECOMPUTE_COST = 0.33  # of a step's time, for recomputing every layer: a forward pass of three
SMALL_BATCH_TOKENS = 350  # a micro-batch costs as if it had this many tokens more
RESERVE = 0.05  # of the memory, for fragments and what is not modelled
GIB = 2**30


@dataclass(frozen=True)
class HeadMemory:
    """Bytes at the output head. fixed: whatever the tokens; token: of a token's logits; at_once: tokens that have theirs."""

    fixed: float
    token: float
    at_once: float

    def bytes(self, tokens: int) -> float:
        """Of a micro-batch of so many tokens."""
        return self.fixed + self.token * min(tokens, self.at_once)


@dataclass(frozen=True)
class MemoryModel:
    """Bytes on one GPU. capacity: what may be used; static: weights, gradients, optimizer states.

    kept, recomputed: a token's activations when all layers keep theirs, and when none does; hidden: a token's hidden
    state; head: what logits take; update: what the optimizer's step takes, when activations are gone.
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
        """Bytes that are kept for backward with `layers` of the layers recomputed."""
        share = layers / max(1, self.num_layers)
        return tokens * (self.kept * (1 - share) + self.recomputed * share)

    def working(self, tokens: int, layers: int) -> float:
        """Bytes besides at the peak, which is at the head or in the last layer's backward: nothing is freed by then."""
        layer = (self.kept - self.recomputed) / max(1, self.num_layers)
        under_way = tokens * layer * (LAYER_AT_WORK if layers else LAYER_IN_BACKWARD)
        return max(self.head.bytes(tokens) + tokens * self.hidden * HIDDEN_AT_HEAD, under_way)

    def peak(self, tokens: int, layers: int) -> float:
        """Bytes of a step with `layers` of the layers recomputed."""
        return self.static + max(self.activations(tokens, layers) + self.working(tokens, layers), self.update)


@dataclass(frozen=True)
class MemoryChoice:
    """What was chosen. layers: recomputed ones; peak: bytes expected, None where nothing was measured."""

    micro_batch_size: int
    layers: int
    num_layers: int
    peak: float | None = None


def best_fit(
    memory: MemoryModel, rows: list[int], layers: list[int], seq: int, before: int | None = None
) -> MemoryChoice:
    """The fastest of rows × layers by a model of time; the smallest if none fits.

    rows: possible micro-batch sizes; layers: possible numbers of recomputed layers; seq: tokens of a row. before: the
    rows that the run was begun with, which are kept if they fit: dropout's masks hang on them.
    """

    def cost(pair: tuple[int, int]) -> float:
        share = pair[1] / max(1, memory.num_layers)
        return (1 + RECOMPUTE_COST * share) * (1 + SMALL_BATCH_TOKENS / (pair[0] * seq))

    pairs = [(n, k) for n in rows for k in layers]
    limit = memory.capacity * (1 - RESERVE)
    fitting = [pair for pair in pairs if memory.peak(pair[0] * seq, pair[1]) <= limit]
    kept = [pair for pair in fitting if pair[0] == before]
    chosen = min(kept or fitting, key=cost) if fitting else (min(rows), max(layers))
    return MemoryChoice(*chosen, memory.num_layers, memory.peak(chosen[0] * seq, chosen[1]))


def longest_row(run: config.RunConfig, documents: int) -> int:
    """Tokens of a row at most. documents: most of them in one; prompt tuning puts its virtual tokens in front of each."""
    return run.data.max_seq_len + (
        run.method.num_virtual_tokens * documents if run.method.type == "prompt-tuning" else 0
    )


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one GPU besides weights and activations.

    optimizer: masters and moments; bucket: where gradients are summed over ranks; update: only in the step itself.
    """

    gradients: float
    optimizer: float
    bucket: float
    update: float

    @property
    def lasting(self) -> float:
        """What stays from step to step."""
        return self.gradients + self.optimizer + self.bucket


def state_bytes(run: config.RunConfig, number: int, world_size: int, largest: int) -> StateMemory:
    """Of `number` trained weights, with everything on the GPU but paged moments: these come for one parameter at a time.

    largest: weights of the largest parameter.
    """
    own = 4 if run.train.precision == "fp32" else 2
    if owns_optimizer(run.train, run.deepspeed):
        moments = 2.2 if run.train.optimizer.removesuffix(PAGED) == EIGHT_BIT else 8.0
        near = largest if run.train.optimizer.endswith(PAGED) else number
        return StateMemory(number * own, number * (2 if own == 2 else 0) + near * moments, 0.0, 0.0)
    gradients = own / (world_size if run.deepspeed.zero_stage > 1 else 1)
    update = (own + 4) / world_size  # flat gradients, and the same in fp32
    bucket = own * size_of(run.deepspeed, "reduce_bucket_size")
    if run.deepspeed.offload != "none":  # masters, moments and the step itself are the host's
        return StateMemory(number * gradients, 0.0, bucket, 0.0)
    return StateMemory(number * gradients, number * 12 / world_size, bucket, number * update)


def gathered_bytes(run: config.RunConfig, number: int) -> float:
    """Weights that ZeRO-3 keeps whole on a GPU at once, and those under way, of a model of `number`."""
    most = size_of(run.deepspeed, "stage3_max_live_parameters") + size_of(run.deepspeed, "stage3_prefetch_bucket_size")
    return min(number, most) * (4 if run.train.precision == "fp32" else 2)


def head_of(run: config.RunConfig, vocabulary: int, width: int, is_trained: bool, in_pieces: bool = True) -> HeadMemory:
    """What logits of the vocabulary take.

    Logits of a piece of the tokens and their gradient, with label smoothing or in fp32 their float32 forms besides; of a
    head that is trained also its gradient's sum in fp32. Not in pieces (heads that aren't plain): those of all,
    besides the four bytes of each that its activations hold.
    """
    in_fp32 = run.train.precision == "fp32"
    if not in_pieces:
        return HeadMemory(0.0, 8.0 * vocabulary, math.inf)
    each = 12 if run.train.label_smoothing else 8 if in_fp32 else 4
    fixed = (8 if in_fp32 else 4) * vocabulary * width if is_trained else 0
    return HeadMemory(fixed, each * vocabulary, piece_tokens(vocabulary))


def piece_tokens(vocabulary: int) -> int:
    """Tokens whose logits are in memory at once: 4096 of a vocabulary of 128,256."""
    return max(256, PIECE_LOGITS // vocabulary // 256 * 256)
