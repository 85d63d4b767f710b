"""Formats a comparison as lines of text."""

from __future__ import annotations

from typing import Any

from ftray.config import FIGURES
from ftray.evaluate.results import Comparison, GateResult
from ftray.evaluate.stats import Difference

PERCENT = ("loss", "perplexity", "general_loss")  # their change is shown in percent
NUM_GROUPS, NUM_CLASSES = 20, 5  # lines at most


def report(comparison: Comparison, speed: dict[str, Any]) -> list[str]:
    """Lines of the whole report, without the answers."""
    lines = [*table(comparison), *[f"verdict: {sentence}" for sentence in comparison.verdict]]
    return lines + details(comparison, speed) + gate_lines(comparison.gates)


def details(comparison: Comparison, speed: dict[str, Any]) -> list[str]:
    """Lines of slices, labels, pairs and speed."""
    return _slices(comparison.slices) + _classes(comparison.classes) + _pairs(comparison.pairs) + _speed(speed)


def table(comparison: Comparison) -> list[str]:
    """Lines of the side-by-side table."""
    (_, *names, _), rows = figure_rows(comparison)
    lines = ["", f"{'':<16}{''.join(f'{name:>10}' for name in names)}   95% interval"]
    lines += [f"{title:<16}{''.join(f'{cell:>10}' for cell in cells)}   {last}" for title, *cells, last in rows]
    return [*lines, counted(comparison)]


def counted(comparison: Comparison) -> str:
    """The number of tokens and answers behind the metrics."""
    base = comparison.base
    over = f"{base.num_trained_tokens} tokens of the eval set"
    rest = f", other metrics over {base.num_answers} answers" if base.num_answers else ""
    return f"(loss over {over}{rest}; intervals by paired bootstrap)"


def figure_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the side-by-side table."""
    base, tuned, few_shot = comparison.base, comparison.tuned, comparison.few_shot
    shots = [f"{comparison.settings['few_shot']}-shot"] if few_shot else []
    rows = []
    for name, figure in FIGURES.items():
        b, t, difference = base.figure(name), tuned.figure(name), comparison.differences["tuned - base"].get(name)
        if b is None or t is None or difference is None:
            continue
        f = few_shot.figure(name) if few_shot else None
        middle = [] if few_shot is None else ["-" if f is None else f"{f:.4f}"]
        rows.append([figure.title, f"{b:.4f}", *middle, f"{t:.4f}", *_change(name, difference)])
    return ["", "base", *shots, "tuned", "change", "95% interval"], rows


def _change(name: str, difference: Difference) -> tuple[str, str]:
    if (
        name in PERCENT
        and difference.ratio is not None
        and difference.ratio_low is not None
        and difference.ratio_high is not None
    ):
        ends = (difference.ratio_low, difference.ratio_high)
        return f"{100 * difference.ratio:+.1f}%", f"{100 * ends[0]:+.1f}% to {100 * ends[1]:+.1f}%"
    return f"{difference.difference:+.3f}", f"{difference.low:+.3f} to {difference.high:+.3f}"


def _slices(slices: dict[str, Any] | None) -> list[str]:
    if slices is None:
        return []
    groups = sorted(slices["groups"].items(), key=lambda item: (-item[1]["num_examples"], item[0]))
    names = [name for name in FIGURES if name in slices["spread"] and name not in ("perplexity", "rouge_1", "rouge_2")]
    lines = ["", f"by {slices['column']} (base → tuned)"]
    for group, scores in groups[:NUM_GROUPS]:
        cells = [
            f"{FIGURES[n].title} {scores['base'][n]:.3f} → {scores['tuned'][n]:.3f}"
            for n in names
            if n in scores["tuned"]
        ]
        lines.append(f"  {_cut(group, 24):<24} {scores['num_examples']:>6} examples   {' · '.join(cells)}")
    if len(groups) > NUM_GROUPS:
        lines.append(f"  … and {len(groups) - NUM_GROUPS} more in results.json")
    apart = [
        f"{FIGURES[n].title} {slices['spread'][n]['base']:.3f} → {slices['spread'][n]['tuned']:.3f}" for n in names
    ]
    return [*lines, f"  difference between the best and the worst group: {' · '.join(apart)}"]


def _classes(classes: dict[str, Any] | None) -> list[str]:
    """Labels with the lowest F1 of the tuned model, and its most frequent confusions."""
    if classes is None:
        return []
    tuned = classes["tuned"]
    rows = [(label, row) for label, row in tuned["per_class"].items() if row["num"]]
    rows = sorted(rows, key=lambda item: (item[1]["f1"], item[0]))[:NUM_CLASSES]
    lines = ["", f"labels with the lowest F1 of the tuned model, of {len(tuned['per_class'])}"]
    lines += [
        f"  {_cut(label, 32):<32} F1 {r['f1']:.2f}   precision {r['precision']:.2f}   recall {r['recall']:.2f}   of {r['num']}"
        for label, r in rows
    ]
    labels = tuned["labels"]
    wrong = [
        (number, labels[i], labels[j])
        for i, row in enumerate(tuned["confusion"])
        for j, number in enumerate(row)
        if i != j and number
    ]
    for number, wanted, given in sorted(wrong, key=lambda w: (-w[0], w[1:]))[:NUM_CLASSES]:
        lines.append(f"  {number} × {_cut(wanted, 32)} classified as {_cut(given, 32)}")
    return lines


def _pairs(pairs: dict[str, Any] | None) -> list[str]:
    if pairs is None:
        return []
    shares = [
        f"{name} gives the same answer to {100 * pairs[name]['same']:.0f}% (ROUGE-L {pairs[name]['rouge_l']:.3f})"
        for name in ("base", "tuned")
    ]
    return [
        "",
        f"{pairs['num']} pairs of prompts that differ in one attribute: {', '.join(shares)}; see evaluate/pairs.jsonl",
    ]


def _speed(speed: dict[str, Any]) -> list[str]:
    lines = []
    for name, s in speed.items():
        cost = (
            f", {s['cost_per_1000_tokens']:.4g} per 1,000 tokens" if s.get("cost_per_1000_tokens") is not None else ""
        )
        lines.append(
            f"speed: {name.replace('_', '-')} {s['tokens_per_s']:.0f} tokens/s, an answer in {s['latency_p50_s']:.2f} s "
            f"(95% within {s['latency_p95_s']:.2f} s){cost}"
        )
    return lines


def gate_lines(gates: list[GateResult]) -> list[str]:
    """One line per limit of a gate."""
    return [f"gate: {gate}: {'passed' if gate.passed else 'MISSED'}" for gate in gates]


def side_by_side(generations: list[dict[str, Any]]) -> list[str]:
    """Lines that show the models' answers to each question."""
    lines = []
    for g in generations:
        lines += ["", f"question   {_cut(g['question'])}", f"reference  {_cut(g['reference'])}"]
        lines += [f"{name.replace('_', '-'):<11}{_cut(g[name])}" for name in ("base", "few_shot", "tuned") if name in g]
    return lines


def _cut(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
