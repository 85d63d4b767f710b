"""The statistics as one HTML page: no script, no request, plots as inline SVG; readable on a phone and on paper."""

from __future__ import annotations

from html import escape

from ftray.data.stats import Part, Stats, facts

WIDTH, HEIGHT, ROOM = 480, 150, 24  # of a plot, in its own units; room: under it, for numbers
MAX_BARS = 40
BAR_FROM, BAR_WIDTH, NAME_CHARS = 205, 215, 30
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --line: #d1d9e0; --bar: #2f6feb; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d; --bar: #6ea8fe; --paper: #0d1117; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 46rem;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin-bottom: .25rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; }
svg { width: 100%; max-width: 38rem; height: auto; display: block; } svg rect { fill: var(--bar); }
svg text { fill: var(--dim); font: 12px system-ui, sans-serif; } svg line { stroke: var(--line); }
.warnings { border-left: 4px solid #d29922; padding-left: 1rem; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { :root { --ink: #000; --dim: #333; --line: #999; --bar: #555; --paper: #fff; } section { break-inside: avoid; } }
"""


def render_page(stats: Stats, name: str) -> str:
    """The whole page. Texts of the data are escaped."""
    parts = "".join(_part(part) for part in (stats.train, stats.heldout) if part is not None)
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in stats.warnings)
    look = f'<section class="warnings"><h2>Worth a look</h2><ul>{warnings}</ul></section>' if warnings else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Data of {escape(name)}</title><style>{STYLE}</style></head>"
        f"<body><h1>Data of {escape(name)}</h1>{look}{parts}</body></html>\n"
    )


def _part(part: Part) -> str:
    title = "Training" if part.name == "train" else "Held out"
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(part))
    plots = _plot("Tokens in a record", [(f"{low}–{high - 1}", number) for low, high, number in part.histogram()])
    if part.labels:
        plots += _bars("Records of each label", [(label, float(n)) for label, n in part.labels.items()], "{:,.0f}")
    if len(part.scripts) > 1:
        plots += _bars("Letters by script", [(s.title(), 100 * share) for s, share in part.scripts.items()], "{:.1f}%")
    styles = [(style, 100 * share) for style, share in part.styles.items()]
    plots += _bars("Answers that …", styles, "{:.0f}%", most=100.0)
    return f"<section><h2>{title}</h2><dl>{told}</dl></section>{plots}"


def _plot(title: str, bins: list[tuple[str, int]]) -> str:
    """Columns, for bins in order; the first, the middle and the last are named."""
    if not bins:
        return ""
    most, step = max(number for _, number in bins) or 1, WIDTH / len(bins)
    columns = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{HEIGHT * (1 - number / most):.1f}" width="{max(1.0, step - 2):.1f}" '
        f'height="{HEIGHT * number / most:.1f}"><title>{escape(name)}: {number:,}</title></rect>'
        for i, (name, number) in enumerate(bins)
    )
    places = sorted({0, len(bins) // 2, len(bins) - 1})
    anchors = {0: "start", len(bins) - 1: "end"}
    names = "".join(
        f'<text x="{(i + 0.5) * step if anchors.get(i) is None else i and WIDTH:.1f}" y="{HEIGHT + 16}" '
        f'text-anchor="{anchors.get(i, "middle")}">{escape(bins[i][0])}</text>'
        for i in places
    )
    label = f"{title}: {len(bins)} ranges from {bins[0][0]} to {bins[-1][0]}, at most {most:,} records in one"
    return (
        f'<section><h3>{escape(title)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT + ROOM}" role="img" '
        f'aria-label="{escape(label)}">{columns}<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>{names}</svg></section>'
    )


def _bars(title: str, values: list[tuple[str, float]], form: str, most: float = 0.0) -> str:
    """Bars side by side with their names; of very many, the first MAX_BARS."""
    shown, line = values[:MAX_BARS], 24
    most = most or max((value for _, value in shown), default=1.0) or 1.0
    rows = "".join(
        f'<text x="0" y="{i * line + 16}">{escape(_short(name))}</text>'
        f'<rect x="{BAR_FROM}" y="{i * line + 5}" width="{max(1.0, BAR_WIDTH * value / most):.1f}" height="14"/>'
        f'<text x="{BAR_FROM + 6 + BAR_WIDTH * value / most:.1f}" y="{i * line + 16}">{form.format(value)}</text>'
        for i, (name, value) in enumerate(shown)
    )
    more = f"<p>and {len(values) - MAX_BARS} more</p>" if len(values) > MAX_BARS else ""
    label = f"{title}: " + ", ".join(f"{name} {form.format(value)}" for name, value in shown[:10])
    return (
        f'<section><h3>{escape(title)}</h3><svg viewBox="0 0 {WIDTH} {len(shown) * line + 4}" role="img" '
        f'aria-label="{escape(label)}">{rows}</svg>{more}</section>'
    )


def _short(name: str) -> str:
    return name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}…"
