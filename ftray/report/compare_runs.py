"""Two runs side by side: which settings, data and environment differ, and what came of it. From storage alone."""

from __future__ import annotations

from typing import Any

from ftray import config
from ftray.config import FIGURES
from ftray.console import duration
from ftray.driver.lineage import environment_changes
from ftray.report.run_report import ReportData

SAME = "the same"


def compare_reports(a: ReportData, b: ReportData) -> list[str]:
    """Lines: what differs, then figures of both."""
    lines = [f"settings   {_settings(a, b)}", f"data       {_data(a, b)}", f"packages   {_environment(a, b)}", ""]
    rows = [["", a.run.name, b.run.name], *_figures(a, b)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return lines + [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _settings(a: ReportData, b: ReportData) -> str:
    found = config.differing_keys(a.run.identity(), b.run.identity())
    return "; ".join(found) or SAME


def _lineage(known: ReportData) -> dict[str, Any]:
    found: dict[str, Any] = known.identity.get("lineage") or {}
    return found


def _data(a: ReportData, b: ReportData) -> str:
    hashes = [known.newest.meta["data_hash"] if known.newest else None for known in (a, b)]
    if None in hashes:
        return "not known of a run without a checkpoint"
    if hashes[0] == hashes[1]:
        return SAME
    one, two = ({f["uri"]: f["rows"] for f in _lineage(known).get("data", {}).get("files", [])} for known in (a, b))
    if not one or not two:
        return "other rows"
    changed = [f"{uri} gives other rows" for uri in sorted(one.keys() & two.keys()) if one[uri] != two[uri]]
    changed += [f"only {a.run.name} has {uri}" for uri in sorted(one.keys() - two.keys())]
    changed += [f"only {b.run.name} has {uri}" for uri in sorted(two.keys() - one.keys())]
    more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
    return (
        "; ".join(changed[:5]) + more if changed else "the same files in another order, or with other records left out"
    )


def _environment(a: ReportData, b: ReportData) -> str:
    one, two = _lineage(a).get("environment"), _lineage(b).get("environment")
    if one is None or two is None:
        return "not known of both"
    return f"in {b.run.name}, {'; '.join(changes)}" if (changes := environment_changes(one, two)) else SAME


def _figures(a: ReportData, b: ReportData) -> list[list[str]]:
    rows = [
        [name, *(_told(known, name) for known in (a, b))]
        for name in ("steps", "tokens", "training loss", "best held-out", "tokens/s", "time", "goodput", "failures")
    ]
    for name, figure in FIGURES.items():
        values = [known.comparison.tuned.figure(name) if known.comparison else None for known in (a, b)]
        if any(value is not None for value in values):
            rows.append([f"tuned: {figure.title}", *("–" if value is None else f"{value:.4f}" for value in values)])
    return [row for row in rows if set(row[1:]) != {"–"}]


def _told(known: ReportData, name: str) -> str:
    metrics, history, best = known.metrics, known.history, known.newest.progress.best if known.newest else None
    losses = [line["loss"] for line in metrics if line.get("loss") is not None]
    seconds = sum(line["num_tokens"] / line["tokens_per_s"] for line in metrics if line.get("tokens_per_s"))
    tokens = sum(line["num_tokens"] for line in metrics)
    found = {
        "steps": f"{len(metrics):,}" if metrics else None,
        "tokens": f"{tokens:,}" if tokens else None,
        "training loss": f"{losses[-1]:.4f}" if losses else None,
        "best held-out": f"{best['loss']:.4f} at step {best['step']:.0f}" if best else None,
        "tokens/s": f"{tokens / seconds:,.0f}" if seconds else None,
        "time": duration(history.running_s) if history.sessions else None,
        "goodput": f"{history.goodput:.0%}" if history.goodput is not None else None,
        "failures": str(history.num_failures) if history.sessions else None,
    }[name]
    return found or "–"
