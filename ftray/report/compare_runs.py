"""Compares two runs from storage: settings, data, environment and metrics."""

from __future__ import annotations

from typing import Any

from ftray import config
from ftray.config import FIGURES
from ftray.console import duration
from ftray.driver.lineage import environment_changes
from ftray.report.run_report import ReportData

SAME = "the same"
METRICS = ("steps", "tokens", "training loss", "best eval loss", "tokens/s", "time", "goodput", "failures")


def differences(a: ReportData, b: ReportData) -> list[str]:
    """Which settings, data and packages differ, as lines."""
    return [f"settings   {_settings(a, b)}", f"data       {_data(a, b)}", f"packages   {_environment(a, b)}"]


def metric_rows(a: ReportData, b: ReportData) -> list[list[str]]:
    """The metrics of both runs as rows, the first one with their names."""
    rows = [["", a.run.name, b.run.name]]
    rows += [[name, *(_metric(data, name) for data in (a, b))] for name in METRICS]
    for name, figure in FIGURES.items():
        values = [data.comparison.tuned.figure(name) if data.comparison else None for data in (a, b)]
        if any(value is not None for value in values):
            rows.append([f"tuned: {figure.title}", *("–" if value is None else f"{value:.4f}" for value in values)])
    return [row for row in rows if set(row[1:]) != {"–"}]


def _settings(a: ReportData, b: ReportData) -> str:
    return "; ".join(config.differing_keys(a.run.identity(), b.run.identity())) or SAME


def _lineage(data: ReportData) -> dict[str, Any]:
    lineage: dict[str, Any] = data.identity.get("lineage") or {}
    return lineage


def _data(a: ReportData, b: ReportData) -> str:
    hashes = [data.newest.meta["data_hash"] if data.newest else None for data in (a, b)]
    if None in hashes:
        return "unknown for a run without a checkpoint"
    if hashes[0] == hashes[1]:
        return SAME
    one, two = ({f["uri"]: f["rows"] for f in _lineage(data).get("data", {}).get("files", [])} for data in (a, b))
    if not one or not two:
        return "other packed sequences"
    changed = [f"{uri} gives other packed sequences" for uri in sorted(one.keys() & two.keys()) if one[uri] != two[uri]]
    changed += [f"only {a.run.name} has {uri}" for uri in sorted(one.keys() - two.keys())]
    changed += [f"only {b.run.name} has {uri}" for uri in sorted(two.keys() - one.keys())]
    more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
    return (
        "; ".join(changed[:5]) + more if changed else "the same files in another order, or with other records dropped"
    )


def _environment(a: ReportData, b: ReportData) -> str:
    one, two = _lineage(a).get("environment"), _lineage(b).get("environment")
    if one is None or two is None:
        return "unknown for at least one run"
    return f"in {b.run.name}, {'; '.join(changes)}" if (changes := environment_changes(one, two)) else SAME


def _metric(data: ReportData, name: str) -> str:
    metrics, history, best = data.metrics, data.history, data.newest.progress.best if data.newest else None
    losses = [line["loss"] for line in metrics if line.get("loss") is not None]
    seconds = sum(line["num_tokens"] / line["tokens_per_s"] for line in metrics if line.get("tokens_per_s"))
    tokens = sum(line["num_tokens"] for line in metrics)
    cells = {
        "steps": f"{len(metrics):,}" if metrics else None,
        "tokens": f"{tokens:,}" if tokens else None,
        "training loss": f"{losses[-1]:.4f}" if losses else None,
        "best eval loss": f"{best['loss']:.4f} at step {best['step']:.0f}" if best else None,
        "tokens/s": f"{tokens / seconds:,.0f}" if seconds else None,
        "time": duration(history.running_s) if history.sessions else None,
        "goodput": f"{history.goodput:.0%}" if history.goodput is not None else None,
        "failures": str(history.num_failures) if history.sessions else None,
    }[name]
    return cells or "–"
