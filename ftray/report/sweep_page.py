"""A sweep as one HTML page, or as a part of another; how a page looks and plots is in `page`.

Knows the state; nothing of how it came about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ftray.report.html import PlotAxis, PlotCurve, bars, lines, page, path, section, svg, table, wide
from ftray.tune.space import as_word
from ftray.tune.state import SweepState, TrialRecord

WIDTH, HEIGHT, TOP, SIDE = (
    720,
    300,
    24,
    60,
)  # of the plot of settings, in its own units; top, side: for names and numbers


def render_page(
    name: str, state: SweepState, winner: TrialRecord, importance: tuple[float, dict[str, float]] | None, command: str
) -> str:
    """The whole page."""
    return page(f"Sweep of {name}", render_sweep(state, winner, importance, command))


def render_sweep(
    state: SweepState,
    winner: TrialRecord,
    importance: tuple[float, dict[str, float]] | None,
    command: str,
    level: int = 2,
) -> str:
    """The sweep's parts. level: of their headings."""
    trials = [t for t in state.trials if t.best is not None]
    best = winner.best
    assert best is not None
    told = (
        f"<p>Best: {escape(winner.name)}, held-out loss {best.loss:.4f} at step {best.step} of {winner.num_steps}.</p>"
    )
    told += f"<p><code>{escape(command)}</code></p>" if command else ""
    told += section("Settings and held-out loss", wide(_parallel(trials, winner), "settings of the trials"), level)
    told += section("Held-out loss during training", _curves(trials, winner), level)
    if importance is not None and importance[1]:
        title = f"What decided the loss at {importance[0]:.0%} of the steps"
        told += bars(title, [(key, 100 * share) for key, share in importance[1].items()], "{:.0f}%", most=100.0)
    return told + section("Trials", _table(state, winner), level)


def _parallel(trials: Sequence[TrialRecord], winner: TrialRecord) -> str:
    """One line a trial through an axis for each key and one for the loss; the best on top."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    columns = [(key, {t.number: t.params[key] for t in trials if key in t.params}) for key in keys]
    columns.append(("held-out loss", {t.number: t.best.loss for t in trials if t.best}))
    axes = [PlotAxis(list(values.values()), as_word) for _, values in columns]
    step = (WIDTH - 2 * SIDE) / max(1, len(columns) - 1)
    drawn, names = "", ""
    for i, ((key, _), axis) in enumerate(zip(columns, axes, strict=True)):
        x = SIDE + i * step
        anchor = "start" if i == 0 else "end" if i == len(columns) - 1 else "middle"
        drawn += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - TOP}"/>'
        title = escape(key) + (" (log)" if axis.is_log else "")
        names += f'<text x="{x:.1f}" y="{14 if i % 2 == 0 else HEIGHT - 6}" text-anchor="{anchor}">{title}</text>'
        beside = f'x="{x - 5:.1f}" text-anchor="end"' if i == 0 else f'x="{x + 5:.1f}"'  # where lines strike fewest
        lower = 4 if i in (0, len(columns) - 1) else -4
        names += "".join(f'<text {beside} y="{_y(at) + lower:.1f}">{escape(name)}</text>' for at, name in axis.ticks())
    for trial in _best_last(trials, winner):
        points = [
            (SIDE + i * step, _y(axis.place(values[trial.number])))
            for i, ((_, values), axis) in enumerate(zip(columns, axes, strict=True))
            if trial.number in values
        ]
        curve = _curve(trial, winner, axes[-1].place(columns[-1][1][trial.number]), points)
        drawn += path(points, curve)
    label = f"{len(trials)} trials, {len(keys)} keys and the held-out loss"
    return svg(drawn + names, label, WIDTH, HEIGHT)


def _curves(trials: Sequence[TrialRecord], winner: TrialRecord) -> str:
    """Held-out loss over the share of the steps; each ends with its trial's number where there is room."""
    best = PlotAxis([t.best.loss for t in trials if t.best])
    curves = [
        _curve(
            trial,
            winner,
            best.place(trial.best.loss) if trial.best else 1.0,
            [(r.share, r.loss) for r in trial.reports if math.isfinite(r.loss)],
        )
        for trial in _best_last(trials, winner)
    ]
    shares = [(share, f"{share:.0%}") for share in (0.0, 0.5, 1.0)]
    return lines(curves, shares, f"Held-out losses of {len(trials)} trials over their steps")


def _table(state: SweepState, winner: TrialRecord) -> str:
    keys = list(dict.fromkeys(key for trial in state.trials for key in trial.params))
    shown = sorted(state.trials, key=lambda t: t.best.loss if t.best else math.inf)
    rows = [
        [
            trial.name,
            *(as_word(trial.params[key]) if key in trial.params else "–" for key in keys),
            f"failed: {trial.error}" if trial.status == "failed" else trial.status,
            f"{trial.step} of {trial.num_steps}",
            f"{trial.best.loss:.4f}" if trial.best else "–",
        ]
        for trial in shown
    ]
    return table("trials", ["trial", *keys, "status", "steps", "best held-out loss"], rows, best=shown.index(winner))


def _best_last(trials: Sequence[TrialRecord], winner: TrialRecord) -> list[TrialRecord]:
    return sorted(trials, key=lambda t: (t is winner, -(t.best.loss if t.best else math.inf)))


def _y(place: float) -> float:
    """Low values are at the bottom."""
    return HEIGHT - TOP - 8 - place * (HEIGHT - 2 * TOP - 16)


def _curve(trial: TrialRecord, winner: TrialRecord, place: float, points: Sequence[tuple[float, float]]) -> PlotCurve:
    """A trial's line. place: of its best loss among all, which gives its colour."""
    loss = f"{trial.best.loss:.4f}" if trial.best else ""
    told = ", ".join(f"{key}={as_word(value)}" for key, value in trial.params.items())
    kind = "best" if trial is winner else ""
    return PlotCurve(f"{trial.name}: {told}; {loss}", points, kind, color=_color(place), tag=str(trial.number))


def _color(place: float) -> str:
    """Blue for the lowest loss, orange for the highest."""
    return f"hsl({215 - 185 * min(1.0, max(0.0, place)):.0f} 75% var(--tone))"
