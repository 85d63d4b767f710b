"""A sweep as one HTML page: no script, no request, plots as inline SVG. Knows the state; nothing of how it came about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from ftray.tune.space import as_word
from ftray.tune.state import State, Trial

FEW = 4  # numbers that are all named on their axis
WIDTH, HEIGHT, TOP, SIDE = 720, 300, 24, 60  # of a plot, in its own units; top, side: room for names and numbers
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --line: #d1d9e0; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d; --paper: #0d1117; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 56rem;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font: 12px system-ui, sans-serif;
  paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
svg line { stroke: var(--line); } svg path { fill: none; stroke-width: 1.5; } svg path.best { stroke-width: 4; }
svg path:hover { stroke-width: 4; } svg rect { fill: #2f6feb; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr.best td { font-weight: 600; } code { overflow-wrap: anywhere; }
@media print { :root { --ink: #000; --dim: #333; --line: #999; --paper: #fff; } section { break-inside: avoid; } }
"""


def render_page(
    name: str, state: State, winner: Trial, importance: tuple[float, dict[str, float]] | None, command: str
) -> str:
    """The whole page. Texts are escaped."""
    trials = [t for t in state.trials if t.best is not None]
    best = winner.best
    assert best is not None
    parts = [
        f"<p>Best: {escape(winner.name)}, held-out loss {best.loss:.4f} at step {best.step} of {winner.num_steps}.</p>",
        f"<p><code>{escape(command)}</code></p>",
        _section("Settings and held-out loss", _parallel(trials, winner)),
        _section("Held-out loss during training", _curves(trials, winner)),
    ]
    if importance is not None and importance[1]:
        parts.append(_section(f"What decided the loss at {importance[0]:.0%} of the steps", _bars(importance[1])))
    parts.append(_section("Trials", _table(state, winner)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Sweep of {escape(name)}</title><style>{STYLE}</style></head>"
        f"<body><h1>Sweep of {escape(name)}</h1>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


class Axis:
    """Places of values on a line from 0 to 1: numbers by size (by magnitude where they span much), others side by side."""

    def __init__(self, values: Sequence[Any]) -> None:
        numbers = [number for number in map(_number, values) if number is not None]
        self._is_number = len(numbers) == len(values) and len(set(numbers)) > 1
        self._names = sorted(set(map(as_word, values)))
        self._low, self._high = (min(numbers), max(numbers)) if self._is_number else (0.0, 1.0)
        self._few = sorted(set(numbers))[: FEW + 1]
        self._is_log = self._is_number and self._low > 0 and self._high / self._low >= 10

    def place(self, value: Any) -> float:
        """Where a value stands."""
        number = _number(value)
        if not self._is_number or number is None:
            return (self._names.index(as_word(value)) + 0.5) / len(self._names)
        if self._is_log:
            return math.log(number / self._low) / math.log(self._high / self._low)
        return (number - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places that are named."""
        if not self._is_number:
            return [((i + 0.5) / len(self._names), name) for i, name in enumerate(self._names)]
        if len(self._few) <= FEW:
            return [(self.place(value), f"{value:.3g}") for value in self._few]
        middle = math.sqrt(self._low * self._high) if self._is_log else (self._low + self._high) / 2
        return [(place, f"{value:.3g}") for place, value in ((0.0, self._low), (0.5, middle), (1.0, self._high))]


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _parallel(trials: Sequence[Trial], winner: Trial) -> str:
    """One line a trial through an axis for each key and one for the loss; the best on top."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    columns = [(key, {t.number: t.params[key] for t in trials if key in t.params}) for key in keys]
    columns.append(("held-out loss", {t.number: t.best.loss for t in trials if t.best}))
    axes = [Axis(list(values.values())) for _, values in columns]
    step = (WIDTH - 2 * SIDE) / max(1, len(columns) - 1)
    drawn, names = "", ""
    for i, ((key, _), axis) in enumerate(zip(columns, axes, strict=True)):
        x = SIDE + i * step
        anchor = "start" if i == 0 else "end" if i == len(columns) - 1 else "middle"
        drawn += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - TOP}"/>'
        names += f'<text x="{x:.1f}" y="{14 if i % 2 == 0 else HEIGHT - 6}" text-anchor="{anchor}">{escape(key)}</text>'
        names += "".join(
            f'<text x="{x + 5:.1f}" y="{_y(at) + 4:.1f}">{escape(name)}</text>' for at, name in axis.ticks()
        )
    for trial in _best_last(trials, winner):
        points = [
            (SIDE + i * step, _y(axis.place(values[trial.number])))
            for i, ((_, values), axis) in enumerate(zip(columns, axes, strict=True))
            if trial.number in values
        ]
        drawn += _path(points, trial, winner, axes[-1].place(columns[-1][1][trial.number]))
    return _svg(drawn + names, f"{len(trials)} trials, {len(keys)} keys and the held-out loss")


def _curves(trials: Sequence[Trial], winner: Trial) -> str:
    """Held-out loss over the share of the steps."""
    losses = [r.loss for t in trials for r in t.reports if math.isfinite(r.loss)]
    axis, best = Axis(losses), Axis([t.best.loss for t in trials if t.best])
    drawn = "".join(
        f'<line x1="{SIDE}" x2="{WIDTH - SIDE}" y1="{_y(at):.1f}" y2="{_y(at):.1f}"/>'
        f'<text x="{SIDE - 6}" y="{_y(at) + 4:.1f}" text-anchor="end">{name}</text>'
        for at, name in axis.ticks()
    )
    drawn += "".join(
        f'<text x="{SIDE + share * (WIDTH - 2 * SIDE):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{share:.0%}</text>'
        for share in (0, 0.5, 1)
    )
    for trial in _best_last(trials, winner):
        points = [
            (SIDE + r.share * (WIDTH - 2 * SIDE), _y(axis.place(r.loss)))
            for r in trial.reports
            if math.isfinite(r.loss)
        ]
        drawn += _path(points, trial, winner, best.place(trial.best.loss) if trial.best else 1.0)
        x, y = points[-1]
        drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_color(best.place(trial.best.loss) if trial.best else 1)}"/>'
    return _svg(drawn, f"Held-out losses of {len(trials)} trials over their steps")


def _bars(shares: dict[str, float]) -> str:
    line, start = 24, 260
    drawn = "".join(
        f'<text x="0" y="{i * line + 16}">{escape(key)}</text>'
        f'<rect x="{start}" y="{i * line + 4}" width="{max(1.0, share * (WIDTH - start - 60)):.1f}" height="15"/>'
        f'<text x="{start + 6 + share * (WIDTH - start - 60):.1f}" y="{i * line + 16}">{share:.0%}</text>'
        for i, (key, share) in enumerate(shares.items())
    )
    label = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
    return f'<svg viewBox="0 0 {WIDTH} {len(shares) * line + 4}" role="img" aria-label="{escape(label)}">{drawn}</svg>'


def _table(state: State, winner: Trial) -> str:
    keys = list(dict.fromkeys(key for trial in state.trials for key in trial.params))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("trial", *keys, "status", "steps", "best held-out loss"))
    rows = ""
    for trial in sorted(state.trials, key=lambda t: t.best.loss if t.best else math.inf):
        cells = [
            trial.name,
            *(as_word(trial.params[key]) if key in trial.params else "–" for key in keys),
            f"failed: {trial.error}" if trial.status == "failed" else trial.status,
            f"{trial.step} of {trial.num_steps}",
            f"{trial.best.loss:.4f}" if trial.best else "–",
        ]
        kind = ' class="best"' if trial is winner else ""
        rows += f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _best_last(trials: Sequence[Trial], winner: Trial) -> list[Trial]:
    return sorted(trials, key=lambda t: (t is winner, -(t.best.loss if t.best else math.inf)))


def _y(place: float) -> float:
    """Low values are at the bottom."""
    return HEIGHT - TOP - 8 - place * (HEIGHT - 2 * TOP - 16)


def _path(points: Sequence[tuple[float, float]], trial: Trial, winner: Trial, place: float) -> str:
    line = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    loss = f"{trial.best.loss:.4f}" if trial.best else ""
    told = ", ".join(f"{key}={as_word(value)}" for key, value in trial.params.items())
    kind = ' class="best"' if trial is winner else ""
    return f'<path{kind} d="M{line}" stroke="{_color(place)}"><title>{escape(f"{trial.name}: {told}; {loss}")}</title></path>'


def _color(place: float) -> str:
    """Blue for the lowest loss, orange for the highest."""
    return f"hsl({215 - 185 * min(1.0, max(0.0, place)):.0f} 75% 50%)"


def _svg(drawn: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{drawn}</svg>'
