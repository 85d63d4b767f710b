"""The run report, `<run>/report.html`: everything that storage holds of a run, on one page.

Needs neither data, nor model, nor Ray, so it can be written at any time, also while the run trains or after it failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml
from markupsafe import Markup

from ftray import config, storage
from ftray.console import Console, duration
from ftray.data.chunks import streams
from ftray.data.index import Index, read_index, read_record_table
from ftray.data.stats import DatasetStats, collect, warn
from ftray.driver.lineage import checked_lineage
from ftray.driver.run_record import check_identity, read_identity
from ftray.errors import ConfigError, DataError, ModelError
from ftray.evaluate.report import counted, details, figure_rows, gate_lines
from ftray.evaluate.results import Comparison, read_results
from ftray.events.event_log import read_events
from ftray.events.types import AlertRaised, TrainingStarted
from ftray.report.data_page import render_parts
from ftray.report.goodput import RunHistory, as_rows, history_of
from ftray.report.gpu_specs import card_of, flops_a_token, mfu
from ftray.report.html import Chart, HtmlTable, Series, chart, page, render
from ftray.report.model_shape import shape_of
from ftray.report.sweep_page import render_sweep
from ftray.train.checkpoint.catalog import CheckpointRef, list_checkpoints, read_metrics
from ftray.tune.state import SweepState, read_state

MAX_POINTS = 1000  # per curve; neighboring steps are averaged beyond that
MAX_RECORDS = 500_000  # above, the per-record tables are not read
SAMPLES, SAMPLE_CHARS = 8, 1200  # answers shown, and characters of each
CURVES = (  # title, key of metrics.jsonl, unit
    ("Learning rate", "learning_rate", "learning rate"),
    ("Gradient norm", "grad_norm", "gradient norm"),
    ("Throughput", "tokens_per_s", "tokens per second"),
    ("Time waiting for data", "data_wait_s", "seconds per step"),
    ("Peak memory of GPU 0", "peak_memory_gib", "GiB"),
)
Line = Mapping[str, Any]


@dataclass(frozen=True)
class ReportData:
    """What storage holds of a run. newest: its last checkpoint. damaged: one sentence per file that can't be read."""

    run: config.RunConfig
    run_dir: str
    identity: dict[str, Any]
    newest: CheckpointRef | None
    metrics: list[dict[str, Any]]
    history: RunHistory
    comparison: Comparison | None
    sweep: SweepState | None
    damaged: tuple[str, ...] = ()


def write_report(run: config.RunConfig, run_dir: str) -> str:
    """Writes `<run>/report.html`; returns its URI. Raises ConfigError for a run that was never started, StorageError."""
    uri = storage.join(run_dir, "report.html")
    storage.write_bytes(uri, render_report(read_report_data(run, run_dir)).encode())
    return uri


def try_report(run: config.RunConfig, run_dir: str, console: Console) -> None:
    """Writes the report; a failure is only a warning, because the run's own outcome matters more."""
    try:
        with storage.brief(20.0):
            write_report(run, run_dir)
    except Exception as err:  # noqa: BLE001 - any failure of the page
        console.warn(f"report.html was not written ({type(err).__name__}: {err}); try: ftray report {run.directory}")


def report_to(run: config.RunConfig, run_dir: str, console: Console, path: str | None) -> None:
    """Writes the report into the run's directory, or to a file, and prints its path."""
    data = read_report_data(run, run_dir)
    for each in data.damaged:
        console.warn(each)
    target = storage.join(run_dir, "report.html") if path is None else str(Path(path))
    storage.write_bytes(storage.absolute(target), render_report(data).encode())
    console.say(f"report: {target}")


def read_report_data(run: config.RunConfig, run_dir: str) -> ReportData:
    """Reads everything about a run. Files that are damaged otherwise are listed in `damaged`.

    Raises:
        ConfigError: The run was never started, or was trained with other settings.
    """
    check_identity(run, run_dir)
    identity = read_identity(run_dir)
    if identity is None:
        raise ConfigError(f"{run_dir} holds no run (it has no run.json); train first: ftray train <run file>")
    damaged: list[str] = []
    try:
        checked_lineage(identity, run_dir)
    except storage.DamagedFile as err:
        damaged.append(str(err))
        del identity["lineage"]
    checkpoints, metrics = list_checkpoints(run_dir, damaged.append), read_metrics(run_dir, warn=damaged.append)
    return ReportData(
        run,
        run_dir,
        identity,
        checkpoints[0] if checkpoints else None,
        metrics,
        history_of(read_events(run_dir, damaged.append), metrics),
        read_results(run_dir, damaged.append),
        read_state(storage.join(run_dir, "tune"), damaged.append),
        tuple(damaged),
    )


def render_report(data: ReportData) -> str:
    """Renders the whole page, without passwords and keys."""
    skipped = [line["step"] for line in data.metrics if line.get("skipped")]
    body = render(
        "report.html",
        summary=_summary(data),
        damaged=data.damaged,
        alerts=_alerts(data.history),
        charts=_charts(data.metrics),
        skipped=f"{len(skipped)} steps with non-finite values were skipped, the first is {skipped[0]}."
        if skipped
        else "",
        evaluation=_guarded(_evaluation, data, "evaluate", "ftray evaluate"),
        sweep=_guarded(_sweep, data, "tune", "ftray tune"),
        data=_data(data),
        history=HtmlTable("history", ["time (UTC)", "event"], as_rows(data.history), wrapped=1),
        environment=_environment(data),
        settings=_settings(data.run),
    )
    return page(f"Run {data.run.name}", body)


def _guarded(part: Callable[[ReportData], Markup], data: ReportData, place: str, remedy: str) -> Markup:
    """Renders a part of the page, or a sentence if a file below `place` holds unexpected values."""
    try:
        return part(data)
    except (LookupError, TypeError, ValueError, AttributeError, storage.DamagedFile) as err:
        text = f"A file in {storage.join(data.run_dir, place)} is damaged ({err}); {remedy} writes it again."
        return Markup("<p>{}</p>").format(text)


def _summary(data: ReportData) -> list[tuple[str, str]]:
    run, newest, history = data.run, data.newest, data.history
    pairs = [("state", _state(data)), ("model", f"{run.model.base}, {run.method.type}, {run.train.precision}")]
    losses = [line["loss"] for line in data.metrics if line.get("loss") is not None]
    if losses:
        tokens = sum(line["num_tokens"] for line in data.metrics)
        pairs.append(("training loss", _first_and_last(losses)))
        pairs.append(("trained on", f"{tokens:,} tokens in {len(data.metrics):,} steps"))
    if newest is not None and newest.progress.best:
        best = newest.progress.best
        pairs.append(("eval loss", f"best {best['loss']:.4f}, at step {best['step']:.0f}"))
    if data.comparison is not None:
        pairs += [("verdict", sentence) for sentence in data.comparison.verdict]
        missed = len(data.comparison.missed)
        pairs += [("gates", f"{missed} missed" if missed else "all passed")] if data.comparison.gates else []
    pairs += [("MFU", text) for text in [_mfu(data)] if text]
    if history.goodput is not None:
        steps = f"{duration(history.productive_s)} ({history.goodput:.0%}, the goodput) in committed steps"
        failures = f"{history.num_failures} failure{'s' if history.num_failures != 1 else ''}"
        pairs.append(("time", f"{duration(history.running_s)}, of which {steps}; {failures}"))
    if run.scale.price_per_hour is not None and history.sessions:
        price = run.scale.price_per_hour
        pairs.append(("cost", f"{history.cost(price):,.2f} for training, at {price:g} per worker hour"))
    return pairs


def _mfu(data: ReportData) -> str:
    """MFU of the median step; "" if the GPUs or the model's shape are unknown."""
    starts = _starts(data.history)
    speeds = [line["tokens_per_s"] for line in data.metrics if line.get("tokens_per_s")]
    kinds = {(event.device, event.workers) for event in starts}
    card = (
        card_of(starts[-1].device) if starts and len(kinds) == 1 else None
    )  # steps on different GPUs are not comparable
    if card is None or not speeds:
        return ""
    try:
        shape = shape_of(data.run.model)
    except ModelError:
        return ""
    (_, workers), *_ = kinds
    num_gpus, method = workers * data.run.scale.gpus_per_worker, data.run.method
    share, speed = mfu(shape, method, card, num_gpus, median(speeds)), median(speeds)
    sum_of = f"{speed:,.0f} tokens/s × {flops_a_token(shape, method) / 1e9:,.2f} GFLOP"
    return f"{share:.1%}: {sum_of} over {num_gpus:g} × {card.tflops:g} TFLOP/s ({card.name}, 16 bits, dense)"


def _first_and_last(losses: list[float]) -> str:
    """First and last loss, as means of up to ten steps, because a single step is noisy."""
    count = min(10, len(losses) // 2)
    if count < 2:
        return f"{losses[0]:.4f} → {losses[-1]:.4f}"
    return f"{fmean(losses[:count]):.4f} → {fmean(losses[-count:]):.4f} (means of the first and last {count} steps)"


def _state(data: ReportData) -> str:
    if data.newest is None:
        return "a sweep" if data.sweep is not None else "started, without a checkpoint yet"
    step, sessions = data.newest.step, data.history.sessions
    if data.newest.progress.finished:
        return f"trained to the end, {step} steps"
    how = sessions[-1].how if sessions else ""
    return f"{how or 'training, or killed'} at step {step}; the same command continues it"


def _starts(history: RunHistory) -> list[TrainingStarted]:
    return [logged.event for logged in history.events if isinstance(logged.event, TrainingStarted)]


def _alerts(history: RunHistory) -> list[str]:
    events = [logged.event for logged in history.events]
    return [f"step {event.step}: {event.text}" for event in events if isinstance(event, AlertRaised)]


def _charts(metrics: Sequence[Line]) -> list[Chart]:
    """Losses and other metrics over the steps."""

    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"] + 1, line[key]) for line in metrics if line.get(key) is not None]

    loss = Series("training", thinned(points("loss")), is_smoothed=True)
    eval_loss = Series("eval", points("eval_loss"), "var(--second)", dash=(7, 4), marks=True, width=2)
    charts = [chart("Loss", "step", "loss", [loss, eval_loss], _chart_summary("Loss", metrics, "loss"))]
    for title, key, unit in CURVES:
        series = Series(unit, thinned(points(key)), is_smoothed=key != "learning_rate")
        charts.append(chart(title, "step", unit, [series], _chart_summary(title, metrics, key)))
    return [each for each in charts if each is not None]


def _chart_summary(name: str, metrics: Sequence[Line], key: str) -> str:
    """A curve in words."""
    values = [line[key] for line in metrics if line.get(key) is not None]
    if not values:
        return name
    ends = f"first {values[0]:.4g}, last {values[-1]:.4g}, minimum {min(values):.4g}, maximum {max(values):.4g}"
    return f"{name} over {len(values)} steps: {ends}"


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Returns at most `most` points, each the mean of its neighbors."""
    size = -(-len(points) // most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _evaluation(data: ReportData) -> Markup:
    comparison = data.comparison
    if comparison is None:
        return Markup()
    head, rows = figure_rows(comparison)
    directory = storage.join(data.run_dir, "evaluate")
    speed = storage.find_object(storage.join(directory, "speed.json")) or {}
    uri = storage.join(directory, "generations.jsonl")
    answers = storage.read_bytes(uri).splitlines()[:SAMPLES] if storage.exists(uri) else []
    return render(
        "evaluation.html",
        metrics=HtmlTable("metrics of base and tuned model", head, rows),
        counts=counted(comparison),
        verdict=comparison.verdict,
        gates=gate_lines(comparison.gates),
        details="\n".join(details(comparison, speed)).strip("\n"),
        samples=[_sample(storage.parse_object(line)) for line in answers],
    )


def _sample(line: Line) -> dict[str, Any]:
    names = [name for name in ("base", "few_shot", "tuned") if name in line]
    return {
        "question": [("question", _cut(line["question"])), ("reference", _cut(line["reference"]))],
        "answers": [(name.replace("_", "-"), _cut(line[name])) for name in names],
    }


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARS else f"{text[:SAMPLE_CHARS]}…"


def _sweep(data: ReportData) -> Markup:
    state = data.sweep
    winner = state.winner() if state is not None else None
    if state is None or winner is None:
        return Markup()
    results = storage.find_object(storage.join(data.run_dir, "tune", "results.json")) or {}
    tree = results.get("importance")
    importance = (tree["share_of_steps"], tree["keys"]) if tree else None
    return render_sweep(state, winner, importance, results.get("best", {}).get("command", ""), level=3)


def _data(data: ReportData) -> Markup:
    """Sources, counts, dropped records and lengths, from the index that the run was trained with."""
    data_hash = data.newest.meta["data_hash"] if data.newest else data.sweep.data_hash if data.sweep else ""
    directory = storage.join(data.run_dir, "data")
    try:
        stream, eval_stream = streams(data.run.data, dict)  # no record is read, so no tokenizer is needed
    except DataError as err:
        return render_parts(None, note=str(err))
    indexes = [read_index(directory, each) for each in data_hash.split("-") if each]
    if not indexes or indexes[0] is None:
        return render_parts(None, note="This directory holds no index of the data.") if data.newest else Markup()
    sources = _sources(data.run, indexes[0])
    splits = []
    for name, each, index in zip(("train", "eval"), (stream, eval_stream), indexes, strict=False):
        if each is not None and index is not None and index.total("num_records") <= MAX_RECORDS:
            try:
                splits.append(collect(each, index, read_record_table(index, directory), name, data.run.data.labels))
            except DataError as err:
                return render_parts(None, sources=sources, note=str(err))
    if not splits or splits[0].name != "train":
        return render_parts(None, sources=sources, note="For lengths, labels and duplicates run: ftray data stats")
    eval_split = splits[1] if len(splits) > 1 else None
    warnings = warn(splits[0], eval_split, data.run.train.global_batch_size, data.run.data)
    return render_parts(DatasetStats(splits[0], eval_split, warnings), level=3, sources=sources)


def _sources(run: config.RunConfig, index: Index) -> HtmlTable:
    rows = []
    for number, group in groupby(index.facts, key=lambda f: f.chunk.source):
        chunks, source = list(group), run.data.train[number]
        totals = [sum(getattr(f, name) for f in chunks) for name in ("num_records", "num_tokens", "num_sequences")]
        weight = "–" if source.weight is None else f"{source.weight:g}"
        num_files = len({piece.uri for f in chunks for piece in f.chunk.pieces})
        rows.append(
            [
                source.path,
                f"{num_files:,}",
                weight,
                *(f"{n:,}" for n in totals),
            ]
        )
    head = ["source", "files", "weight", "records", "tokens", "packed sequences"]
    return HtmlTable("training sources", head, rows)


def _environment(data: ReportData) -> list[tuple[str, str]]:
    identity = data.identity
    pairs = [("config hash", identity.get("config_hash", "")), ("directory", data.run_dir)]
    if data.newest is not None:
        pairs.append(("data hash", data.newest.meta["data_hash"]))
    if identity.get("parent"):
        pairs.append(("started from", identity["parent"]))
    if lineage := identity.get("lineage"):
        env = lineage["environment"]
        pairs.append(("lineage", lineage["id"]))
        pairs.append(("ftray version", env["code"]["commit"] or env["code"]["sha256"]))
        pairs.append(("machine", ", ".join(filter(None, (env["cpu"], f"Python {env['python']}", env["image"])))))
        pairs += [(f"from step {c['step']}", "; ".join(c["changes"])) for c in lineage.get("continued", [])]
    devices = {f"{start.workers} × {start.device}" for start in _starts(data.history)}
    pairs += [("workers", ", ".join(sorted(devices)))] if devices else []
    pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in identity.get("versions", {}).items())))
    return [(name, text) for name, text in pairs if text]


def _settings(run: config.RunConfig) -> str:
    """The settings that differ from the defaults, as a run file."""
    tree = {key: value for key, value in run.model_dump(mode="json", exclude_defaults=True).items() if value != {}}
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text
