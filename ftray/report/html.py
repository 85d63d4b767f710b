"""How ftray's HTML pages look and plot: one file, no script, no request, plots as inline SVG.

Readable on a phone, on paper, in the dark and without colour: lines differ by their dashes, bars carry their numbers.
All texts are escaped here. Knows numbers and words; nothing of data, runs or sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 480, 200  # of a plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 28, 22, 22  # of a plot of lines: room for numbers and names
COLUMNS_HEIGHT, ROOM = 150, 24  # of a plot of columns; room: under it, for numbers
FEW = 4  # numbers that are all named on their axis
MAX_BARS, BAR_FROM, BAR_WIDTH, NAME_CHARS = 40, 205, 215, 30
DASHES = ("", "7 4", "2 3", "10 3 2 3")  # of the lines of a plot, in order
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --line: #d1d9e0; --bar: #2f6feb; --paper: #ffffff;
  --second: #b35900; --tone: 36%; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d; --bar: #6ea8fe; --paper: #0d1117; --second: #f0a35e; --tone: 55%; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 56rem;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin-bottom: .25rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; }
svg { width: 100%; max-width: 38rem; height: auto; display: block; } svg rect { fill: var(--bar); }
svg text { fill: var(--dim); font: 12px system-ui, sans-serif; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
svg line { stroke: var(--line); } svg path { fill: none; stroke: var(--bar); stroke-width: 1.5; }
svg path.second { stroke: var(--second); stroke-width: 2; } svg circle { fill: var(--second); }
svg path.best, svg path:hover { stroke-width: 4; }
div.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 1.5rem; }
div.grid > * { min-width: 0; }
div.wide { overflow-x: auto; } div.wide svg { min-width: 36rem; max-width: none; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
td.text { white-space: normal; overflow-wrap: anywhere; } tr.best td { font-weight: 600; }
pre { white-space: pre-wrap; font-size: .85rem; } code { overflow-wrap: anywhere; }
.warnings { border-left: 4px solid #d29922; padding-left: 1rem; }
.sample { border-left: 2px solid var(--line); padding-left: 1rem; margin: 1rem 0; } .sample dd { white-space: pre-wrap; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print {
  :root { --ink: #000; --dim: #333; --line: #999; --bar: #555; --second: #000; --paper: #fff; --tone: 30%; }
  section, .sample { break-inside: avoid; } section.long { break-inside: auto; } div.wide { overflow: visible; }
}
"""


_CLASS = {"text": ' class="text"', "best": ' class="best"'}


def page(title: str, body: str) -> str:
    """A whole page. body: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def section(title: str, body: str, level: int = 2, kind: str = "") -> str:
    """A part with its heading; nothing for an empty body. kind: `warnings`, or `long` for what may break over pages."""
    named = f' class="{kind}"' if kind else ""
    return f"<section{named}><h{level}>{escape(title)}</h{level}>{body}</section>" if body else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and their texts."""
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f"<dl>{told}</dl>" if told else ""


def items(texts: Iterable[str]) -> str:
    """A list."""
    told = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{told}</ul>" if told else ""


def wide(body: str, label: str) -> str:
    """What scrolls by itself where it is wider than the page, by keys too."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>'


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]], best: int = -1, texts: int = -1) -> str:
    """A table. best: the row that is set off; texts: the column whose texts wrap."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(
            f"<td{_CLASS['text'] if place == texts else ''}>{escape(cell)}</td>" for place, cell in enumerate(row)
        )
        body += f"<tr{_CLASS['best'] if number == best else ''}>{cells}</tr>"
    return wide(f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>", label)


def svg(drawn: str, label: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    """A plot. label: what it shows, for those who don't see it."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{drawn}</svg>'


def columns(title: str, bins: Sequence[tuple[str, int]], what: str) -> str:
    """Columns, for bins in order; the first, the middle and the last are named. what: is counted."""
    if not bins:
        return ""
    most, step, height = max(number for _, number in bins) or 1, WIDTH / len(bins), COLUMNS_HEIGHT
    drawn = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{height * (1 - number / most):.1f}" width="{max(1.0, step - 2):.1f}" '
        f'height="{height * number / most:.1f}"><title>{escape(name)}: {number:,}</title></rect>'
        for i, (name, number) in enumerate(bins)
    )
    places = sorted({0, len(bins) // 2, len(bins) - 1})
    anchors = {0: "start", len(bins) - 1: "end"}
    names = "".join(
        f'<text x="{(i + 0.5) * step if anchors.get(i) is None else i and WIDTH:.1f}" y="{height + 16}" '
        f'text-anchor="{anchors.get(i, "middle")}">{escape(bins[i][0])}</text>'
        for i in places
    )
    label = f"{title}: {len(bins)} ranges from {bins[0][0]} to {bins[-1][0]}, at most {most:,} {what} in one"
    floor = f'<line x1="0" x2="{WIDTH}" y1="{height}" y2="{height}"/>'
    return section(title, svg(f"{drawn}{floor}{names}", label, height=height + ROOM), 3)


def bars(title: str, values: Sequence[tuple[str, float]], form: str, most: float = 0.0) -> str:
    """Bars side by side with their names; of very many, the first MAX_BARS. form: of their numbers, e.g. `{:.0%}`."""
    if not values:
        return ""
    shown, line = values[:MAX_BARS], 24
    most = most or max(value for _, value in shown) or 1.0
    rows = "".join(
        f'<text x="0" y="{i * line + 16}">{escape(_short(name))}</text>'
        f'<rect x="{BAR_FROM}" y="{i * line + 5}" width="{max(1.0, BAR_WIDTH * value / most):.1f}" height="14"/>'
        f'<text x="{BAR_FROM + 6 + BAR_WIDTH * value / most:.1f}" y="{i * line + 16}">{form.format(value)}</text>'
        for i, (name, value) in enumerate(shown)
    )
    more = f"<p>and {len(values) - MAX_BARS} more</p>" if len(values) > MAX_BARS else ""
    label = f"{title}: " + ", ".join(f"{name} {form.format(value)}" for name, value in shown[:10])
    return section(title, svg(rows, label, height=len(shown) * line + 4) + more, 3)


def _short(name: str) -> str:
    return name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}…"


class PlotAxis:
    """Places of values on a line from 0 to 1: numbers by size (by magnitude where they span much), others side by side.

    word: a value that is no number, as it is named. is_log: by magnitude.
    """

    def __init__(self, values: Sequence[Any], word: Callable[[Any], str] = str) -> None:
        numbers = [number for number in map(_number, values) if number is not None]
        self._word, self._is_number = word, len(numbers) == len(values) and len(set(numbers)) > 1
        self._names = sorted(set(map(word, values)))
        self._low, self._high = (min(numbers), max(numbers)) if self._is_number else (0.0, 1.0)
        self._few = sorted(set(numbers))[: FEW + 1]
        self.is_log = self._is_number and self._low > 0 and self._high / self._low >= 10

    def place(self, value: Any) -> float:
        """Where a value stands."""
        number = _number(value)
        if not self._is_number or number is None:
            return (self._names.index(self._word(value)) + 0.5) / len(self._names)
        if self.is_log:
            return math.log(number / self._low) / math.log(self._high / self._low)
        return (number - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places that are named."""
        if not self._is_number:
            return [((i + 0.5) / len(self._names), name) for i, name in enumerate(self._names)]
        if len(self._few) <= FEW:
            return [(self.place(value), _brief(value)) for value in self._few]
        middle = math.sqrt(self._low * self._high) if self.is_log else (self._low + self._high) / 2
        return [(place, _brief(value)) for place, value in ((0.0, self._low), (0.5, middle), (1.0, self._high))]


def _brief(value: float) -> str:
    """At most eight characters, which is what fits beside a plot."""
    if 1000 <= abs(value) < 999_999.5:
        return f"{value:,.0f}"
    digits, e, power = (f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.2e}").partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if e else digits


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class PlotCurve:
    """A line. points: places from 0 to 1, and values, finite ones. color: of its own, else by `kind`: "", `second`, `best`.

    dotted: each point is marked, too. tag: stands at its end, where no other does. A color may use var(--tone): how light
    what is drawn on this paper should be.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = ""
    dash: str = ""
    color: str = ""
    dotted: bool = False
    tag: str = ""


def lines(curves: Sequence[PlotCurve], places: Sequence[tuple[float, str]], label: str, legend: bool = False) -> str:
    """Lines over one axis of values; nothing without a point. places: names below, from 0 to 1. legend: names above."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    axis = PlotAxis([value for curve in curves for _, value in curve.points], _brief)
    drawn = f'<text x="{WIDTH - RIGHT}" y="12" text-anchor="end">log scale</text>' if axis.is_log else ""
    drawn += "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(at):.1f}" y2="{_y(at):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{_y(at) + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        for at, name in axis.ticks()
    )
    anchors = {0: "start", len(places) - 1: "end"}
    drawn += "".join(
        f'<text x="{_x(at):.1f}" y="{HEIGHT - 5}" text-anchor="{anchors.get(i, "middle")}">{escape(name)}</text>'
        for i, (at, name) in enumerate(places)
    )
    for curve in curves:
        points = [(_x(at), _y(axis.place(value))) for at, value in curve.points]
        last = points[-1:] if not curve.dotted else points
        drawn += path(points, curve)
        fill = f' style="fill:{curve.color}"' if curve.color else ""
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"{fill}/>' for x, y in last if curve.dotted or fill)
    drawn += _tags([(curve.tag, _x(curve.points[-1][0]), _y(axis.place(curve.points[-1][1]))) for curve in curves])
    if legend:
        for number, curve in enumerate(curves):
            x = LEFT + number * (WIDTH - LEFT - RIGHT) / len(curves)
            drawn += path([(x, 8), (x + 28, 8)], curve) + f'<text x="{x + 34:.1f}" y="12">{escape(curve.name)}</text>'
    return svg(drawn, label)


def _tags(ends: Sequence[tuple[str, float, float]]) -> str:
    """Names at the ends of lines, the last line's first; those that would stand on another are left out."""
    drawn, taken = "", list[tuple[float, float]]()
    for tag, x, y in reversed(ends):
        if tag and all(abs(x - left) > 8 * len(tag) + 8 or abs(y - top) > 12 for left, top in taken):
            taken.append((x, y))
            drawn += f'<text x="{x + 6:.1f}" y="{y + 4:.1f}">{escape(tag)}</text>'
    return drawn


def path(points: Sequence[tuple[float, float]], curve: PlotCurve) -> str:
    """A curve drawn through these points of a plot."""
    line = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    kind = f' class="{curve.kind}"' if curve.kind else ""
    dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
    color = f' style="stroke:{curve.color}"' if curve.color else ""
    return f'<path{kind} d="M{line}"{dash}{color}><title>{escape(curve.name)}</title></path>'


def _x(place: float) -> float:
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _y(place: float) -> float:
    """Low values are at the bottom."""
    return HEIGHT - BOTTOM - 8 - place * (HEIGHT - TOP - BOTTOM - 16)
