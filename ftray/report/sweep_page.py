"""The page of a sweep, also a part of the run report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from ftray.report.html import Chart, Drawing, HtmlTable, PlotAxis, Series, bars, chart, page, render
from ftray.tune.space import as_word
from ftray.tune.state import SweepState, TrialRecord

WIDTH, HEIGHT, TOP, SIDE = 720, 300, 24, 60  # of the parallel coordinates; top, side: margins for names and numbers


def render_page(
    name: str, state: SweepState, winner: TrialRecord, importance: tuple[float, dict[str, float]] | None, command: str
) -> str:
    """Renders the whole page."""
    return page(f"Sweep of {name}", render_sweep(state, winner, importance, command))


def render_sweep(
    state: SweepState,
    winner: TrialRecord,
    importance: tuple[float, dict[str, float]] | None,
    command: str,
    level: int = 2,
) -> Markup:
    """Renders the parts of the page.

    Args:
        state: The sweep.
        winner: Its best trial.
        importance: The share of the steps after which it was computed, and the share of each key.
        command: The command that trains with the best settings.
        level: The level of the headings.
    """
    trials = [t for t in state.trials if t.best is not None]
    best = winner.best
    assert best is not None
    shares = [(key, 100 * share) for key, share in importance[1].items()] if importance else []
    title = f"Importance of each setting for the loss at {importance[0]:.0%} of the steps" if importance else ""
    return render(
        "sweep.html",
        level=level,
        best=f"Best: {winner.name}, eval loss {best.loss:.4f} at step {best.step} of {winner.num_steps}.",
        command=command,
        parallel=_parallel(trials, winner),
        chart=_loss_chart(trials, winner),
        importance=bars(title, shares, "{:.0f}%", most=100.0),
        trials=_table(state, winner),
    )


def _parallel(trials: Sequence[TrialRecord], winner: TrialRecord) -> Drawing:
    """Parallel coordinates: one line per trial through an axis per key and one for the loss; the best on top."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    columns = [(key, {t.number: t.params[key] for t in trials if key in t.params}) for key in keys]
    columns.append(("eval loss", {t.number: t.best.loss for t in trials if t.best}))
    axes = [PlotAxis(list(values.values()), as_word) for _, values in columns]
    step, last = (WIDTH - 2 * SIDE) / max(1, len(columns) - 1), len(columns) - 1
    drawing = Drawing("", f"{len(trials)} trials, {len(keys)} keys and the eval loss", WIDTH, HEIGHT)
    for i, ((key, _), axis) in enumerate(zip(columns, axes, strict=True)):
        x = SIDE + i * step
        drawing.line(x, x, TOP, HEIGHT - TOP)
        anchor = "start" if i == 0 else "end" if i == last else "middle"
        drawing.text(x, 14 if i % 2 == 0 else HEIGHT - 6, key + (" (log)" if axis.is_log else ""), anchor)
        for place, name in axis.ticks():  # beside the axis, where the fewest lines cross
            drawing.text(
                x - 5 if i == 0 else x + 5,
                _y(place) + (4 if i in (0, last) else -4),
                name,
                "end" if i == 0 else "start",
            )
    for trial in _best_last(trials, winner):
        points = [
            (SIDE + i * step, _y(axis.place(values[trial.number])))
            for i, ((_, values), axis) in enumerate(zip(columns, axes, strict=True))
            if trial.number in values
        ]
        color = _color(axes[-1].place(columns[-1][1][trial.number]))
        drawing.path(points, color, _label(trial), is_best=trial is winner)
    return drawing


def _loss_chart(trials: Sequence[TrialRecord], winner: TrialRecord) -> Chart | None:
    """Eval loss over the share of the steps, one curve per trial."""
    axis = PlotAxis([t.best.loss for t in trials if t.best])
    series = [
        Series(
            _label(trial),
            [(100 * r.share, r.loss) for r in trial.reports if math.isfinite(r.loss)],
            color=_color(axis.place(trial.best.loss) if trial.best else 1.0),
            width=4 if trial is winner else 1.5,
        )
        for trial in _best_last(trials, winner)
    ]
    summary = f"Eval loss of {len(trials)} trials. The best one is the thickest line."
    return chart("Eval loss during training", "share of the steps (%)", "eval loss", series, summary)


def _table(state: SweepState, winner: TrialRecord) -> HtmlTable:
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
    return HtmlTable("trials", ["trial", *keys, "status", "steps", "best eval loss"], rows, best=shown.index(winner))


def _best_last(trials: Sequence[TrialRecord], winner: TrialRecord) -> list[TrialRecord]:
    return sorted(trials, key=lambda t: (t is winner, -(t.best.loss if t.best else math.inf)))


def _y(place: float) -> float:
    """The height of a place; low values are at the bottom."""
    return HEIGHT - TOP - 8 - place * (HEIGHT - 2 * TOP - 16)


def _label(trial: TrialRecord) -> str:
    loss = f"{trial.best.loss:.4f}" if trial.best else ""
    settings = ", ".join(f"{key}={as_word(value)}" for key, value in trial.params.items())
    return f"{trial.name}: {settings}; {loss}"


def _color(place: float) -> str:
    """Blue for the lowest loss, orange for the highest."""
    return f"hsl({215 - 185 * min(1.0, max(0.0, place)):.0f} 75% var(--tone))"
