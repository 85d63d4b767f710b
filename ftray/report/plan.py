"""Plans a run before it starts: memory, batch size, steps, time, cost, and advice.

Uses the memory model of `train.memory` and the time model of `gpu_specs`, with the model's shape only: no Ray, torch, GPU or
weights. docs/benchmarks.md and a test compare it with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ftray import config
from ftray.config.constraints import impossible
from ftray.data.order import steps_of
from ftray.data.prepare import read_summary
from ftray.data.sources import list_shards
from ftray.errors import DataError, StorageError
from ftray.report.gpu_specs import CARDS, GpuSpec, card_named, does, tokens_per_s
from ftray.report.model_shape import ModelShape, shape_of
from ftray.train.memory import (
    GIB,
    RESERVE,
    MemoryChoice,
    MemoryModel,
    StateMemory,
    best_fit,
    head_of,
    max_sequence_tokens,
    state_bytes,
)

BYTES_A_TOKEN = 4.5  # of a shard that was not indexed; records are JSON
SMALL = 0.8e9  # parameters; smaller models were not measured
START_S = 90.0  # start of Ray, workers and model
OTHERS: tuple[tuple[str, int, str], ...] = (  # method, stage, optimizer
    ("lora", 0, "adamw"),
    ("qlora", 0, "adamw"),
    ("lora", 3, "adamw"),
    ("full", 0, "adamw-8bit"),
    ("full", 0, "adamw"),
    ("full", 1, "adamw"),
    ("full", 2, "adamw"),
    ("full", 3, "adamw"),
)


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one GPU at the peak of a step.

    Attributes:
        buffers: ZeRO-3's gathered weights, gradients being reduced, and the peak of the optimizer update.
        working: The logits, or one layer's temporaries, whichever is more.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.working


@dataclass(frozen=True)
class Candidate:
    """One way to train on one GPU type. fits: within its memory, minus a reserve for fragmentation."""

    card: str
    method: str
    zero_stage: int
    optimizer: str
    micro_batch_size: int
    recomputed: int
    num_layers: int
    parts: MemoryParts
    fits: bool
    tokens_per_s: float


@dataclass(frozen=True)
class TrainingLength:
    """How much is trained.

    Attributes:
        tokens: Tokens per packed sequence, on average.
        from_index: The numbers are counted, not estimated from file sizes.
        most_documents: Most documents in one packed sequence; 1 if unknown.
    """

    num_steps: int | None
    sequences_per_epoch: int | None
    tokens: float
    num_records: int | None
    from_index: bool
    most_documents: int = 1


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe: tokens per second and worker, and seconds per step, as medians."""

    tokens_per_s: float
    step_s: float
    workers: int
    device: str
    num_steps: int


@dataclass(frozen=True)
class RunPlan:
    """The whole plan. seconds, cost: None if the number of steps or the price is unknown; based on the probe, if any."""

    shape: ModelShape
    num_trained: int
    world_size: int
    choice: Candidate
    alternatives: list[Candidate]
    length: TrainingLength
    seconds: float | None
    cost: float | None
    advice: list[str]
    together: list[str]
    chose_card: bool
    probed: ProbeResult | None = None


def make_plan(
    run: config.RunConfig, run_dir: str, card: str | None = None, probed: ProbeResult | None = None
) -> RunPlan:
    """Plans a run.

    Args:
        run: The run.
        run_dir: Its directory, for the index.
        card: A name in CARDS. Default: scale.accelerator, otherwise the smallest GPU that fits.
        probed: The result of a probe, if one ran.

    Raises:
        ConfigError: The GPU is unknown.
        ModelError: The shape of the base is unknown.
    """
    shape, size = shape_of(run.model), run.world_sizes[0]
    name = card or run.scale.accelerator
    length = length_of(run, run_dir)
    candidates = [candidate_for(run, shape, each, size, length.most_documents) for each in _cards(name, run.method)]
    candidate = next((each for each in candidates if each.fits), candidates[-1])
    others = [candidate_for(other, shape, CARDS[candidate.card], size) for other in _others(run)]
    if name is None:
        others = [each for each in candidates if each is not candidate] + others
    seconds = cost = None
    if length.num_steps is not None:
        tokens = run.train.global_batch_size * length.tokens
        step_s = probed.step_s if probed else tokens / (candidate.tokens_per_s * size)
        seconds = START_S + length.num_steps * step_s
        if run.scale.price_per_hour is not None:
            cost = seconds / 3600 * (probed.workers if probed else size) * run.scale.price_per_hour
    advice = advise(run, length, candidate)
    number = shape.num_trained(run.method)
    return RunPlan(
        shape, number, size, candidate, others, length, seconds, cost, advice, together(run), name is None, probed
    )


def _cards(name: str | None, method: config.MethodConfig) -> list[GpuSpec]:
    if name is not None:
        return [card_named(name, method)]
    return sorted((card for card in CARDS.values() if does(card, method)), key=lambda card: card.gib)


def _others(run: config.RunConfig) -> list[config.RunConfig]:
    """The same run with other methods, ZeRO stages and optimizers, if the combination is valid."""
    runs = []
    for method, stage, optimizer in OTHERS:
        if (method, stage, optimizer) == (run.method.type, run.deepspeed.zero_stage, run.train.optimizer):
            continue
        if stage and run.world_sizes[0] == 1:
            continue  # nothing to shard
        plain = {"rank": run.method.rank, "alpha": run.method.alpha, "target_modules": run.method.target_modules}
        changed = run.model_copy(
            update={
                "method": config.MethodConfig.model_validate({"type": method, **plain}),
                "train": run.train.model_copy(update={"optimizer": optimizer}),
                "deepspeed": run.deepspeed.model_copy(update={"zero_stage": stage, "offload": "none"}),
            }
        )
        if impossible(changed.model_dump(include={"method", "train", "deepspeed"})) is None:
            runs.append(changed)
    return runs


def candidate_for(
    run: config.RunConfig, shape: ModelShape, card: GpuSpec, world_size: int, documents: int = 1
) -> Candidate:
    """Memory and speed of a run on a card, with the rows and recomputed layers that training would choose there.

    documents: most of them in a row.
    """
    seq, per_rank = max_sequence_tokens(run, documents), run.train.global_batch_size // world_size
    given = run.train.micro_batch_size
    rows = [n for n in range(1, per_rank + 1) if per_rank % n == 0] if given == "auto" else [given]
    wanted = {"none": [0], "selective": [shape.num_layers // 2], "full": [shape.num_layers]}
    layers = wanted.get(run.train.gradient_checkpointing, list(range(shape.num_layers + 1)))
    memory = memory_of(run, shape, card, world_size)
    fit = best_fit(memory, rows, layers, seq)
    parts = parts_of(run, shape, memory, fit, world_size, documents)
    tokens = fit.micro_batch_size * seq
    speed = (
        tokens_per_s(run, shape, card, world_size, tokens, fit.layers / shape.num_layers) * run.data.max_seq_len / seq
    )
    fits = parts.total <= memory.capacity * (1 - RESERVE)
    chosen = (run.method.type, run.deepspeed.zero_stage, run.train.optimizer, fit.micro_batch_size, fit.layers)
    return Candidate(card.name, *chosen, shape.num_layers, parts, fits, speed)


def memory_of(run: config.RunConfig, shape: ModelShape, card: GpuSpec, world_size: int) -> MemoryModel:
    """What `train.fit` measures on a GPU, by arithmetic."""
    static = _static(run, shape, world_size)
    update = _states(run, shape, world_size).update
    precision = run.train.precision
    capacity = card.gib * GIB * run.scale.gpus_per_worker
    kept, recomputed = shape.kept_bytes(precision), shape.recomputed_bytes(precision)
    hidden = shape.hidden * (4 if precision == "fp32" else 2)
    head = head_of(run, shape.vocabulary, shape.hidden, run.method.type == "full", not shape.whole_logits)
    return MemoryModel(capacity, static.total, kept, recomputed, shape.num_layers, hidden, head, update)


def _states(run: config.RunConfig, shape: ModelShape, world_size: int) -> StateMemory:
    number = shape.num_trained(run.method)
    return state_bytes(run, number, world_size, shape.head if run.method.type == "full" else number)


def _static(run: config.RunConfig, shape: ModelShape, world_size: int) -> MemoryParts:
    """Memory that is allocated for the whole run."""
    states = _states(run, shape, world_size)
    weights = shape.weight_bytes(run.method, run.train.precision)
    buffers = states.bucket
    if run.deepspeed.zero_stage == 3:
        whole = shape.linears.values()
        gathered = weights / shape.num_parameters * (2 * sum(a * b for a, b in whole) + shape.head)
        weights, buffers = weights / world_size, buffers + gathered
    if run.deepspeed.offload == "all":
        weights = 0.0
    return MemoryParts(weights, states.gradients, states.optimizer, buffers, 0.0, 0.0)


def parts_of(
    run: config.RunConfig,
    shape: ModelShape,
    memory: MemoryModel,
    fit: MemoryChoice,
    world_size: int,
    documents: int = 1,
) -> MemoryParts:
    """The peak of a step, part by part: with all activations, or in the update, whose needs are then among the buffers.

    Without accumulation gradients appear only as activations go.
    """
    static = _static(run, shape, world_size)
    tokens = fit.micro_batch_size * max_sequence_tokens(run, documents)
    activations = memory.activations(tokens, fit.layers)
    working = memory.working(tokens, fit.layers)
    gradients = static.gradients
    if fit.micro_batch_size * world_size == run.train.global_batch_size and run.deepspeed.zero_stage < 3:
        gradients = max(0.0, gradients - activations)
    in_backward = replace(static, gradients=gradients, activations=activations, working=working)
    in_update = replace(static, buffers=static.buffers + memory.update)
    return max(in_backward, in_update, key=lambda parts: parts.total)


def length_of(run: config.RunConfig, run_dir: str) -> TrainingLength:
    """Steps and rows from the index, else guessed from the files' sizes, else as far as train.max_steps says."""
    train, seq = run.train, run.data.max_seq_len
    try:
        known = read_summary(run, run_dir)
    except StorageError:  # a plan can be made without keys to the store
        known = None
    if known is not None:
        rows, counts = known["sequences_per_epoch"], known["train"]
        tokens = counts["num_tokens"] / max(1, counts["num_sequences"])
        steps = steps_of(train.epochs, rows, train.global_batch_size, train.max_steps)
        return TrainingLength(steps, rows, tokens, counts["num_records"], True, counts.get("most_documents", 1))
    try:
        size = sum(shard.size_bytes for source in run.data.train for shard in list_shards(source.path))
    except (DataError, StorageError):
        return TrainingLength(train.max_steps, None, seq, None, False)
    rows = max(1, round(size / BYTES_A_TOKEN / seq))
    steps = max(1, steps_of(train.epochs, rows, train.global_batch_size, train.max_steps))
    return TrainingLength(steps, rows, seq, None, False)


def advise(run: config.RunConfig, length: TrainingLength, candidate: Candidate) -> list[str]:
    """Advice by the size and kind of the data: whether to fine-tune, and what to try first."""
    advice = []
    records = length.num_records
    if records is not None and records < 50:
        advice.append(
            f"{records} records are few: first try the best ones as few-shot examples (evaluate.few_shot compares)"
        )
    elif records is not None and records < 500:
        advice.append(
            f"{records} records teach a format or a tone, hardly knowledge; compare with evaluate.few_shot: 3"
        )
    if run.data.labels is not None:
        advice.append("few-shot classification is often nearly as good; evaluate.few_shot compares")
    if records is not None and records < 5000 and run.method.type == "full":
        advice.append(f"full fine-tuning on {records} records: LoRA learns as much from so few, and forgets less")
    if run.train.epochs > 3 and records is not None and records < 5000:
        advice.append(f"{run.train.epochs:g} epochs over {records} records will overfit; set evaluate.early_stopping")
    if run.data.eval is None:
        advice.append("there is no eval set, so the benefit can't be measured; set data.eval: {fraction: 0.1}")
    if run.method.type == "prompt-tuning" and not length.from_index:
        advice.append(
            "virtual tokens precede each record; this plan assumes one record per sequence, so run `ftray data index` first"
        )
    if not advice:
        advice.append("facts that change or must be quoted are better retrieved into the prompt than trained")
    if not candidate.fits:
        advice.insert(0, f"does not fit on {candidate.card}: see the alternatives that fit, or use more or larger GPUs")
    return advice


def together(run: config.RunConfig) -> list[str]:
    """One line per method: the ZeRO stages that are valid with the run's precision, and why the others are not."""
    lines = []
    for method in ("full", "lora", "qlora", "prompt-tuning"):
        reasons: dict[str, list[str]] = {}
        for stage in range(4):
            tree = run.model_dump(include={"method", "train", "deepspeed"})
            method_tree = config.MethodConfig.model_validate({"type": method}).model_dump()
            tree["method"], tree["deepspeed"]["zero_stage"], tree["deepspeed"]["offload"] = method_tree, stage, "none"
            tree["train"]["optimizer"] = "adamw"
            reasons.setdefault(impossible(tree) or "", []).append(str(stage))
        good = ", ".join(reasons.pop("", [])) or "none"
        why = "".join(f"; not {', '.join(stages)}: {text.split(': ', 1)[1]}" for text, stages in reasons.items())
        lines.append(f"{method} with {run.train.precision}: zero_stage {good}{why}")
    return lines
