"""A plan as text for a terminal, and as a tree for `--json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ftray import config
from ftray.console import duration
from ftray.report.gpu_specs import CARDS, MEASURED
from ftray.report.plan import SMALL, Candidate, MemoryParts, RunPlan
from ftray.train.memory import GIB


def as_tree(plan: RunPlan) -> dict[str, Any]:
    """For `--json`. Bytes, seconds, tokens a second on each GPU."""
    tree = asdict(plan)
    for way, made in ((plan.way, tree["way"]), *zip(plan.others, tree["others"], strict=True)):
        made["parts"]["total"] = way.parts.total
    tree["shape"]["num_parameters"] = plan.shape.num_parameters
    return tree


def as_text(plan: RunPlan, run: config.RunConfig) -> list[str]:
    """For people."""
    way, shape, length, card = plan.way, plan.shape, plan.length, CARDS[plan.way.card]
    gpus = f"{plan.world_size} × {card.name}"
    smallest = ", the smallest that it fits" if way.fits and plan.chose_card else ""
    trained = f"{_number(plan.num_trained)} of them trained ({run.method.type}, {run.train.precision})"
    lines = [
        f"model      {run.model.base}: {_number(shape.num_parameters)} weights, {trained}",
        f"on         {gpus} of {card.gib:g} GiB{smallest}",
        f"memory     {way.parts.total / GIB:.1f} GiB of each GPU: {_parts(way.parts)}",
        f"           {_chosen(way)}" + ("" if way.fits else "; THIS DOES NOT FIT"),
        f"speed      {way.tokens_per_s:,.0f} tokens/s on each GPU"
        + ("" if card.name == MEASURED else f", scaled from an {MEASURED} by data sheet: not measured"),
    ]
    size, seq = run.train.global_batch_size, run.data.max_seq_len
    if length.num_steps is None:
        lines.append("steps      not known: the data can't be listed from here; index it first: ftray data index")
    else:
        is_guess = length.sequences_per_epoch is not None and not length.from_index
        guessed = "; GUESSED from the files' sizes, `ftray data index` counts" if is_guess else ""
        rows = f", {length.sequences_per_epoch:,} rows an epoch" if length.sequences_per_epoch else ""
        most = "" if length.from_index else "at most "
        lines.append(
            f"steps      {length.num_steps:,} of {size} rows of {seq} tokens{rows}: "
            f"{most}{_number(length.num_steps * size * length.tokens)} tokens{guessed}"
        )
    if shape.num_parameters < SMALL:
        lines[4] += "; for a model this small, kernel launch overhead dominates, so expect lower throughput"
    if plan.probed is not None:
        found = plan.probed
        lines.insert(
            5,
            f"measured   {found.tokens_per_s:,.0f} tokens/s on each of {found.workers} × {found.device}, over "
            f"{found.num_steps} steps of a probe; time and cost are by this",
        )
    if plan.seconds is not None:
        lines.append(f"time       {duration(plan.seconds)}, without failures, evaluation and export")
    if plan.cost is not None:
        lines.append(
            f"cost       {plan.cost:,.2f}, at {run.scale.price_per_hour:g} for a GPU's hour (scale.price_per_hour)"
        )
    lines += ["", "other ways", *_table(plan.others)]
    lines += ["", "before you train", *[f"  - {text}" for text in plan.advice]]
    return [
        *lines,
        "",
        "what goes together (all of it: docs/compatibility.md)",
        *[f"  {text}" for text in plan.together],
    ]


def _parts(parts: MemoryParts) -> str:
    told = {name: value for name, value in asdict(parts).items() if value >= 0.05 * GIB}
    return ", ".join(f"{name} {value / GIB:.1f}" for name, value in told.items())


def _chosen(way: Candidate) -> str:
    rows = f"{way.micro_batch_size} row{'s' if way.micro_batch_size > 1 else ''} at once"
    if not way.recomputed:
        return f"{rows}, no layer recomputed"
    return f"{rows}, {way.recomputed} of {way.num_layers} layers recomputed, because more does not fit"


def _table(ways: Sequence[Candidate]) -> list[str]:
    rows = [["", "card", "method", "ZeRO", "optimizer", "rows", "recomputed", "GiB", "fits", "tokens/s"]]
    for way in ways:
        told: Mapping[bool, str] = {True: "yes", False: "no"}
        recomputed = f"{way.recomputed}/{way.num_layers}"
        chosen = [way.card, way.method, str(way.zero_stage), way.optimizer, str(way.micro_batch_size), recomputed]
        rows.append(
            [
                "",
                *chosen,
                f"{way.parts.total / GIB:.1f}",
                told[way.fits],
                f"{way.tokens_per_s:,.0f}" if way.fits else "–",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"
