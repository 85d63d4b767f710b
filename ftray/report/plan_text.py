"""Formats a plan as text, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ftray import config
from ftray.console import aligned, duration
from ftray.report.gpu_specs import CARDS, MEASURED
from ftray.report.plan import SMALL, Candidate, MemoryParts, RunPlan
from ftray.train.memory import GIB


def as_tree(plan: RunPlan) -> dict[str, Any]:
    """The plan as plain values, in bytes, seconds, and tokens per second and GPU."""
    tree = asdict(plan)
    for candidate, made in ((plan.choice, tree["choice"]), *zip(plan.alternatives, tree["alternatives"], strict=True)):
        made["parts"]["total"] = candidate.parts.total
    tree["shape"]["num_parameters"] = plan.shape.num_parameters
    return tree


def as_text(plan: RunPlan, run: config.RunConfig) -> list[str]:
    """The plan as lines of text."""
    candidate, shape, length, card = plan.choice, plan.shape, plan.length, CARDS[plan.choice.card]
    gpus = f"{plan.world_size} × {card.name}"
    smallest = ", the smallest GPU that fits" if candidate.fits and plan.chose_card else ""
    trained = f"{_in_words(plan.num_trained)} trainable ({run.method.type}, {run.train.precision})"
    lines = [
        f"model      {run.model.base}: {_in_words(shape.num_parameters)} parameters, {trained}",
        f"on         {gpus} of {card.gib:g} GiB{smallest}",
        f"memory     {candidate.parts.total / GIB:.1f} GiB per GPU: {_parts(candidate.parts)}",
        f"           {_chosen(candidate)}" + ("" if candidate.fits else "; THIS DOES NOT FIT"),
        f"speed      {candidate.tokens_per_s:,.0f} tokens/s per GPU"
        + ("" if card.name == MEASURED else f", extrapolated from an {MEASURED} by data sheet, not measured"),
    ]
    size, seq = run.train.global_batch_size, run.data.max_seq_len
    if length.num_steps is None:
        lines.append("steps      unknown, because the data can't be listed from here; run first: ftray data index")
    else:
        is_guess = length.sequences_per_epoch is not None and not length.from_index
        guessed = "; ESTIMATED from file sizes, run `ftray data index` for the exact number" if is_guess else ""
        rows = f", {length.sequences_per_epoch:,} packed sequences per epoch" if length.sequences_per_epoch else ""
        most = "" if length.from_index else "at most "
        lines.append(
            f"steps      {length.num_steps:,} of {size} packed sequences of {seq} tokens{rows}: "
            f"{most}{_in_words(length.num_steps * size * length.tokens)} tokens{guessed}"
        )
    if shape.num_parameters < SMALL:
        lines[4] += "; for a model this small, kernel launch overhead dominates, so expect lower throughput"
    if plan.probed is not None:
        probe = plan.probed
        lines.insert(
            5,
            f"measured   {probe.tokens_per_s:,.0f} tokens/s on each of {probe.workers} × {probe.device}, over "
            f"{probe.num_steps} steps of a probe; time and cost use this speed",
        )
    if plan.seconds is not None:
        lines.append(f"time       {duration(plan.seconds)}, without failures, evaluation and export")
    if plan.cost is not None:
        lines.append(
            f"cost       {plan.cost:,.2f}, at {run.scale.price_per_hour:g} per GPU hour (scale.price_per_hour)"
        )
    lines += ["", "alternatives", *_table(plan.alternatives)]
    lines += ["", "before you train", *[f"  - {text}" for text in plan.advice]]
    return [
        *lines,
        "",
        "valid combinations (all: docs/compatibility.md)",
        *[f"  {text}" for text in plan.together],
    ]


def _parts(parts: MemoryParts) -> str:
    shares = {name: value for name, value in asdict(parts).items() if value >= 0.05 * GIB}
    return ", ".join(f"{name} {value / GIB:.1f}" for name, value in shares.items())


def _chosen(candidate: Candidate) -> str:
    rows = (
        f"{candidate.micro_batch_size} packed sequence{'s' if candidate.micro_batch_size > 1 else ''} per micro-batch"
    )
    if not candidate.recomputed:
        return f"{rows}, no gradient checkpointing"
    return f"{rows}, gradient checkpointing in {candidate.recomputed} of {candidate.num_layers} layers, to save memory"


def _table(candidates: Sequence[Candidate]) -> list[str]:
    rows = [["", "card", "method", "ZeRO", "optimizer", "micro-batch", "checkpointed", "GiB", "fits", "tokens/s"]]
    for candidate in candidates:
        recomputed = f"{candidate.recomputed}/{candidate.num_layers}"
        chosen = [
            candidate.card,
            candidate.method,
            str(candidate.zero_stage),
            candidate.optimizer,
            str(candidate.micro_batch_size),
            recomputed,
        ]
        rows.append(
            [
                "",
                *chosen,
                f"{candidate.parts.total / GIB:.1f}",
                "yes" if candidate.fits else "no",
                f"{candidate.tokens_per_s:,.0f}" if candidate.fits else "–",
            ]
        )
    return aligned(rows)


def _in_words(value: float) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"
