"""The page of `ftray data stats --html`, also a part of the run report."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ftray.data.stats import DatasetStats, SplitStats, facts
from ftray.report.html import HtmlTable, bars, columns, page, render


def render_page(stats: DatasetStats, name: str) -> str:
    """Renders the whole page."""
    return page(f"Data of {name}", render_parts(stats))


def render_parts(
    stats: DatasetStats | None, level: int = 2, sources: HtmlTable | None = None, note: str = ""
) -> Markup:
    """Renders a note, the sources, the warnings, both splits and the shown records.

    Args:
        stats: The statistics, if they are known.
        level: The level of the headings.
        sources: A table of the training sources.
        note: A sentence above.
    """
    splits = [each for each in (stats.train, stats.eval_set) if each is not None] if stats else []
    return render(
        "data.html",
        level=level,
        note=note,
        sources=sources,
        warnings=stats.warnings if stats else [],
        splits=[_split(each) for each in splits],
        records=stats.records if stats else [],
    )


def _split(split: SplitStats) -> dict[str, Any]:
    bins = [(f"{low}–{high - 1}", number) for low, high, number in split.histogram()]
    plots = [columns("Tokens per record", bins, "records")]
    if split.labels:
        plots.append(bars("Records per label", [(label, float(n)) for label, n in split.labels.items()], "{:,.0f}"))
    if len(split.scripts) > 1:
        plots.append(bars("Letters by script", [(s.title(), 100 * x) for s, x in split.scripts.items()], "{:.1f}%"))
    styles = [(style, 100 * share) for style, share in split.styles.items()]
    plots.append(bars("Answers that …", styles, "{:.0f}%", most=100.0))
    return {"title": "Training" if split.name == "train" else "Eval", "facts": facts(split), "plots": plots}
