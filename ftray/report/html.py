"""HTML pages: one self-contained file each, rendered from `templates/` with styles and scripts from `static/`.

A page makes no request. Its content security policy allows only the scripts of this package. Curves are drawn by uPlot;
bars and columns are inline SVG. Templates escape all text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ftray.redact import redacted, redacted_tree

WIDTH = 480  # of bars and columns, in SVG units
COLUMNS_HEIGHT, FOOT = 150, 24  # of columns, and of the space below for names
BAR_HEIGHT, BAR_FROM, BAR_WIDTH = 24, 205, 215
MAX_BARS, NAME_CHARS = 40, 30
MAX_TICKS = 4  # values that are all written on an axis; of more, three are
SCRIPTS = ("uplot/uPlot.iife.min.js", "curves.js")
STYLES = ("page.css", "uplot/uPlot.min.css")


@cache
def _environment() -> Environment:
    loader = PackageLoader("ftray.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _static(name: str) -> Markup:
    return Markup((files("ftray.report") / "static" / name).read_text(encoding="utf-8"))  # nosec B704 # a file of the package


def render(template: str, **values: Any) -> Markup:
    """Renders a template of this package. All values are escaped, except Markup."""
    return Markup(_environment().get_template(template).render(values).strip())  # nosec B704 # the template escapes


def page(title: str, body: Markup) -> str:
    """Renders a whole page around its body. Removes passwords and keys from the body."""
    scripts = [_static(name) for name in SCRIPTS] if 'class="chart"' in body else []
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if hashes:
        policy += "; script-src " + " ".join(f"'sha256-{each}'" for each in hashes)
    style = Markup("\n").join(_static(name) for name in STYLES)
    clean = Markup(redacted(str(body)))  # nosec B704 # rendered by a template
    return f"{render('base.html', title=title, body=clean, style=style, scripts=scripts, policy=policy)}\n"


@dataclass(frozen=True)
class HtmlTable:
    """A table. best: index of the highlighted row. wrapped: index of the column with long text."""

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int = -1
    wrapped: int = -1


@dataclass(frozen=True)
class Series:
    """One curve of a chart.

    Args:
        label: Its name in the legend.
        points: Pairs of x and a finite y, in order of x.
        color: CSS color; may contain var(--name).
        dash: Lengths of dashes and gaps in pixels; empty for a solid line.
        marks: Whether each point is marked.
        is_smoothed: Whether the page's smoothing applies.
        width: Line width in pixels.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: str = "var(--bar)"
    dash: Sequence[int] = ()
    marks: bool = False
    is_smoothed: bool = False
    width: float = 1.5


@dataclass(frozen=True)
class Chart:
    """Curves over one x axis. summary: the chart in words, also for screen readers. json: its data for curves.js."""

    title: str
    summary: str
    json: str


def chart(title: str, x_title: str, y_title: str, series: Sequence[Series], summary: str) -> Chart | None:
    """Builds a chart, with a logarithmic y axis where the values span a factor of ten; None without points."""
    series = [each for each in series if each.points]
    if not series:
        return None
    xs = sorted({x for each in series for x, _ in each.points})
    values = [dict(each.points) for each in series]
    tree = {
        "x_title": x_title,
        "y_title": y_title,
        "is_log": PlotAxis([y for each in series for _, y in each.points]).is_log,
        "x": [_rounded(x) for x in xs],
        "series": [
            {
                "label": each.label,
                "values": [_rounded(own[x]) if x in own else None for x in xs],
                "color": each.color,
                "dash": list(each.dash),
                "points": each.marks or len(each.points) == 1,
                "smooth": each.is_smoothed,
                "width": each.width,
            }
            for each, own in zip(series, values, strict=True)
        ],
    }
    return Chart(title, summary, json.dumps(redacted_tree(tree), ensure_ascii=False, allow_nan=False))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass
class Drawing:
    """An SVG drawing. label: its content in words. more: a sentence below it."""

    title: str
    label: str
    width: int
    height: int
    lines: list[dict[str, str]] = field(default_factory=list)
    rects: list[dict[str, str]] = field(default_factory=list)
    paths: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, str]] = field(default_factory=list)
    more: str = ""

    def line(self, x1: float, x2: float, y1: float, y2: float) -> None:
        """Adds a line."""
        self.lines.append({"x1": f"{x1:.1f}", "x2": f"{x2:.1f}", "y1": f"{y1:.1f}", "y2": f"{y2:.1f}"})

    def rect(self, x: float, y: float, width: float, height: float, title: str = "") -> None:
        """Adds a filled rectangle. title: shown on hover."""
        size = {"width": f"{width:.1f}", "height": f"{height:.1f}"}
        self.rects.append({"x": f"{x:.1f}", "y": f"{y:.1f}", "title": title, **size})

    def path(self, points: Sequence[tuple[float, float]], color: str, title: str, is_best: bool = False) -> None:
        """Adds a line through points. title: shown on hover."""
        d = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.paths.append({"d": d, "color": color, "title": title, "is_best": is_best})

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Adds text. anchor: start, middle or end."""
        self.texts.append({"x": f"{x:.1f}", "y": f"{y:.1f}", "text": text, "anchor": anchor})


def columns(title: str, bins: Sequence[tuple[str, int]], unit: str) -> Drawing | None:
    """Draws a histogram of ordered bins; the first, middle and last bin are named. unit: the counted thing."""
    if not bins:
        return None
    most, step, height = max(count for _, count in bins) or 1, WIDTH / len(bins), COLUMNS_HEIGHT
    label = f"{title}: {len(bins)} ranges from {bins[0][0]} to {bins[-1][0]}, at most {most:,} {unit} in one"
    drawing = Drawing(title, label, WIDTH, height + FOOT)
    for i, (name, count) in enumerate(bins):
        size = height * count / most
        drawing.rect(i * step + 1, height - size, max(1.0, step - 2), size, f"{name}: {count:,}")
    drawing.line(0, WIDTH, height, height)
    last = len(bins) - 1
    for i in sorted({0, len(bins) // 2, last}):
        x, anchor = (0.0, "start") if i == 0 else (WIDTH, "end") if i == last else ((i + 0.5) * step, "middle")
        drawing.text(x, height + 16, bins[i][0], anchor)
    return drawing


def bars(title: str, values: Sequence[tuple[str, float]], form: str, most: float = 0.0) -> Drawing | None:
    """Draws named bars, the first MAX_BARS of them.

    Args:
        title: Heading.
        values: Names and values.
        form: Format of the values, for example `{:.0%}`.
        most: The value of a full bar; default: the largest value.
    """
    if not values:
        return None
    shown = values[:MAX_BARS]
    most = most or max(value for _, value in shown) or 1.0
    label = f"{title}: " + ", ".join(f"{name} {form.format(value)}" for name, value in shown[:10])
    drawing = Drawing(title, label, WIDTH, len(shown) * BAR_HEIGHT + 4)
    for i, (name, value) in enumerate(shown):
        top, width = i * BAR_HEIGHT, BAR_WIDTH * value / most
        drawing.text(0, top + 16, name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}…")
        drawing.rect(BAR_FROM, top + 5, max(1.0, width), 14)
        drawing.text(BAR_FROM + 6 + width, top + 16, form.format(value))
    if len(values) > MAX_BARS:
        drawing.more = f"and {len(values) - MAX_BARS} more"
    return drawing


class PlotAxis:
    """Maps values to places from 0 to 1: numbers by size (logarithmic where they span a factor of ten), others in order.

    Args:
        values: All values of the axis.
        word: Names a value that is not a number.
    """

    def __init__(self, values: Sequence[Any], word: Callable[[Any], str] = str) -> None:
        numbers = [number for number in map(_finite_number, values) if number is not None]
        self._word, self._is_number = word, len(numbers) == len(values) and len(set(numbers)) > 1
        self._names = sorted(set(map(word, values)))
        self._low, self._high = (min(numbers), max(numbers)) if self._is_number else (0.0, 1.0)
        self._distinct = sorted(set(numbers))[: MAX_TICKS + 1]
        self.is_log = self._is_number and self._low > 0 and self._high / self._low >= 10

    def place(self, value: Any) -> float:
        """The place of a value."""
        number = _finite_number(value)
        if not self._is_number or number is None:
            return (self._names.index(self._word(value)) + 0.5) / len(self._names)
        if self.is_log:
            return math.log(number / self._low) / math.log(self._high / self._low)
        return (number - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places with a name."""
        if not self._is_number:
            return [((i + 0.5) / len(self._names), name) for i, name in enumerate(self._names)]
        if len(self._distinct) <= MAX_TICKS:
            return [(self.place(value), _brief(value)) for value in self._distinct]
        middle = math.sqrt(self._low * self._high) if self.is_log else (self._low + self._high) / 2
        return [(place, _brief(value)) for place, value in ((0.0, self._low), (0.5, middle), (1.0, self._high))]


def _brief(value: float) -> str:
    """A number in at most eight characters, to fit beside an axis."""
    if 1000 <= abs(value) < 999_999.5:
        return f"{value:,.0f}"
    digits, e, power = (f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.2e}").partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if e else digits


def _finite_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
