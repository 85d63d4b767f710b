"""The statistics as one HTML page, or as a part of another; how a page looks and plots is in `page`."""

from __future__ import annotations

from ftray.data.stats import DatasetStats, SplitStats, facts
from ftray.report.html import bars, columns, items, page, section
from ftray.report.html import facts as as_facts


def render_page(stats: DatasetStats, name: str) -> str:
    """The whole page."""
    return page(f"Data of {name}", render_parts(stats))


def render_parts(stats: DatasetStats, level: int = 2) -> str:
    """Warnings, and both parts. level: of their headings."""
    parts = "".join(_part(part, level) for part in (stats.train, stats.heldout) if part is not None)
    return section("Worth a look", items(stats.warnings), level, "warnings") + parts


def _part(part: SplitStats, level: int) -> str:
    title = "Training" if part.name == "train" else "Held out"
    plots = columns(
        "Tokens in a record", [(f"{low}–{high - 1}", number) for low, high, number in part.histogram()], "records"
    )
    if part.labels:
        plots += bars("Records of each label", [(label, float(n)) for label, n in part.labels.items()], "{:,.0f}")
    if len(part.scripts) > 1:
        plots += bars("Letters by script", [(s.title(), 100 * share) for s, share in part.scripts.items()], "{:.1f}%")
    styles = [(style, 100 * share) for style, share in part.styles.items()]
    plots += bars("Answers that …", styles, "{:.0f}%", most=100.0)
    return section(title, as_facts(facts(part)), level) + f'<div class="grid">{plots}</div>'
