"""One page of all that is known of a run, `<run>/report.html`: what storage holds of it, whatever that is.

Needs neither the data, nor the model, nor Ray: it can be written at any time, also of a run that still trains or failed.
How a page looks and plots is in `page`; what the parts say is in the rooms that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from ftray import config, storage
from ftray.console import Console, duration
from ftray.data.chunks import streams
from ftray.data.index import Index, read_index, read_survey
from ftray.data.stats import DatasetStats, collect, warn
from ftray.driver.lineage import checked_lineage
from ftray.driver.run_record import check_identity, read_identity
from ftray.errors import ConfigError, DataError, Interrupted, ModelError, Preempted
from ftray.evaluate.report import counted, details, figure_rows, gate_lines
from ftray.evaluate.results import Comparison, read_results
from ftray.events.event_log import read_events
from ftray.events.types import AlertRaised, TrainingStarted
from ftray.redact import redacted
from ftray.report.data_page import render_parts
from ftray.report.goodput import RunHistory, as_rows, history_of
from ftray.report.gpu_specs import card_of, flops_a_token, mfu
from ftray.report.html import PlotCurve, facts, items, lines, page, section, table
from ftray.report.model_shape import shape_of
from ftray.report.sweep_page import render_sweep
from ftray.train.checkpoint.catalog import CheckpointRef, list_checkpoints, read_metrics
from ftray.tune.state import SweepState, read_state

MAX_POINTS = 200  # of a curve; more steps are averaged
MAX_RECORDS = 500_000  # described one by one: their tables are read for it
SAMPLES, SAMPLE_CHARS = 8, 1200  # answers shown, and how much of each
Line = Mapping[str, Any]


@dataclass(frozen=True)
class ReportData:
    """What storage holds of a run. newest: its last committed checkpoint; sweep: the state of one; damaged: a sentence for
    each file that can't be read."""

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
    """Writes `<run>/report.html`; returns its URI. Raises ConfigError where no run was started, StorageError."""
    uri = storage.join(run_dir, "report.html")
    storage.write_bytes(uri, render_report(read_known(run, run_dir)).encode())
    return uri


def try_report(run: config.RunConfig, run_dir: str, console: Console) -> None:
    """As `write_report`, where more than the report is at stake: what goes wrong is a warning."""
    try:
        with storage.brief(20.0):
            write_report(run, run_dir)
    except (Preempted, Interrupted):
        raise
    except Exception as err:  # noqa: BLE001 - the run's own outcome counts, whatever a page stumbles over
        console.warn(f"report.html was not written ({type(err).__name__}: {err}); try: ftray report {run.directory}")


def read_known(run: config.RunConfig, run_dir: str) -> ReportData:
    """Raises ConfigError where no run was started, or the run was trained with other settings than these.

    What else is damaged is left out, and named in `damaged`.
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
    found, metrics = list_checkpoints(run_dir, damaged.append), read_metrics(run_dir, warn=damaged.append)
    return ReportData(
        run,
        run_dir,
        identity,
        found[0] if found else None,
        metrics,
        history_of(read_events(run_dir, damaged.append), metrics),
        read_results(run_dir, damaged.append),
        read_state(storage.join(run_dir, "tune"), damaged.append),
        tuple(damaged),
    )


def render_report(known: ReportData) -> str:
    """The whole page. Passwords and keys in addresses are left out."""
    body = "".join(
        (
            facts(_summary(known)),
            section("Damaged files", items(known.damaged), kind="warnings"),
            section("Alerts", items(_alerts(known.history)), kind="warnings"),
            section("Training", _curves(known)),
            section("Evaluation", _guarded(_evaluation, known, "evaluate", "ftray evaluate"), kind="long"),
            section("Sweep", _guarded(_sweep, known, "tune", "ftray tune"), kind="long"),
            section("Data", _data(known), kind="long"),
            section("What happened", _history(known.history), kind="long"),
            section("Environment", facts(_environment(known))),
            section("Settings", f"<pre>{escape(_settings(known.run))}</pre>", kind="long"),
        )
    )
    return page(f"Run {known.run.name}", redacted(body))


def _guarded(render: Callable[[ReportData], str], known: ReportData, place: str, remedy: str) -> str:
    """A part of the page, or a sentence where a file below `place` holds other values than its writer wrote."""
    try:
        return render(known)
    except (LookupError, TypeError, ValueError, AttributeError, storage.DamagedFile) as err:
        told = f"A file in {storage.join(known.run_dir, place)} is damaged ({err}); {remedy} writes it anew."
        return f"<p>{escape(told)}</p>"


def _summary(known: ReportData) -> list[tuple[str, str]]:
    run, found, history = known.run, known.newest, known.history
    told = [("state", _state(known)), ("model", f"{run.model.base}, {run.method.type}, {run.train.precision}")]
    losses = [line["loss"] for line in known.metrics if line.get("loss") is not None]
    if losses:
        tokens = sum(line["num_tokens"] for line in known.metrics)
        told.append(("training loss", _first_to_last(losses)))
        told.append(("trained on", f"{tokens:,} tokens in {len(known.metrics):,} steps"))
    if found is not None and found.progress.best:
        best = found.progress.best
        told.append(("held-out loss", f"best {best['loss']:.4f}, at step {best['step']:.0f}"))
    if known.comparison is not None:
        told += [("verdict", sentence) for sentence in known.comparison.verdict]
        missed = len(known.comparison.missed)
        told += [("gates", f"{missed} missed" if missed else "all passed")] if known.comparison.gates else []
    told += [("MFU", text) for text in [_mfu(known)] if text]
    if history.goodput is not None:
        steps = f"{duration(history.productive_s)} ({history.goodput:.0%}, the goodput) in steps that count"
        failures = f"{history.num_failures} failure{'s' if history.num_failures != 1 else ''}"
        told.append(("time", f"{duration(history.running_s)}, of which {steps}; {failures}"))
    if run.scale.price_per_hour is not None and history.sessions:
        price = run.scale.price_per_hour
        told.append(("cost", f"{history.cost(price):,.2f} for training, at {price:g} for a worker's hour"))
    return told


def _mfu(known: ReportData) -> str:
    """The median step's share of what the cards could do; "" where cards or the base's shape are not known."""
    starts = _starts(known.history)
    speeds = [line["tokens_per_s"] for line in known.metrics if line.get("tokens_per_s")]
    kinds = {(event.device, event.workers) for event in starts}
    card = card_of(starts[-1].device) if starts and len(kinds) == 1 else None  # else the steps are not alike
    if card is None or not speeds:
        return ""
    try:
        shape = shape_of(known.run.model)
    except ModelError:
        return ""
    (_, workers), *_ = kinds
    num_gpus, method = workers * known.run.scale.gpus_per_worker, known.run.method
    share, speed = mfu(shape, method, card, num_gpus, median(speeds)), median(speeds)
    sum_of = f"{speed:,.0f} tokens/s × {flops_a_token(shape, method) / 1e9:,.2f} GFLOP"
    return f"{share:.1%}: {sum_of} over {num_gpus:g} × {card.tflops:g} TFLOP/s ({card.name}, 16 bits, dense)"


def _first_to_last(losses: list[float]) -> str:
    """Where the loss began and ended: means of up to ten steps, since one step's batch says little."""
    count = min(10, len(losses) // 2)
    if count < 2:
        return f"{losses[0]:.4f} → {losses[-1]:.4f}"
    return f"{fmean(losses[:count]):.4f} → {fmean(losses[-count:]):.4f} (means of the first and last {count} steps)"


def _state(known: ReportData) -> str:
    if known.newest is None:
        return "a sweep" if known.sweep is not None else "started, without a checkpoint yet"
    step, sessions = known.newest.step, known.history.sessions
    if known.newest.progress.finished:
        return f"trained to the end, {step} steps"
    how = sessions[-1].how if sessions else ""
    return f"{how or 'training, or killed'} at step {step}; the same command continues it"


def _starts(history: RunHistory) -> list[TrainingStarted]:
    return [logged.event for logged in history.events if isinstance(logged.event, TrainingStarted)]


def _alerts(history: RunHistory) -> list[str]:
    events = [logged.event for logged in history.events]
    return [f"step {event.step}: {event.text}" for event in events if isinstance(event, AlertRaised)]


def _curves(known: ReportData) -> str:
    """Losses and rates over the steps."""
    metrics = known.metrics
    if not metrics:
        return ""
    steps = max(1, metrics[-1]["step"] + 1)
    places = [(share, f"{round(share * steps):,}") for share in (0.0, 0.5, 1.0)]

    def curve(name: str, key: str, kind: str = "", dash: str = "", dotted: bool = False) -> PlotCurve:
        points = [((line["step"] + 1) / steps, line[key]) for line in metrics if line.get(key) is not None]
        return PlotCurve(name, points if dotted else thinned(points), kind, dash, dotted=dotted)

    held_out = curve("eval", "eval_loss", "second", "7 4", dotted=True)
    loss = [curve("training", "loss"), *([held_out] if held_out.points else [])]
    plots = section("Loss over steps", lines(loss, places, _told("loss", metrics, "loss"), legend=len(loss) > 1), 3)
    for title, key in (
        ("Learning rate", "learning_rate"),
        ("Norm of the gradient", "grad_norm"),
        ("Tokens per second", "tokens_per_s"),
        ("Seconds of a step that waited for data", "data_wait_s"),
        ("Peak memory of GPU 0, GiB", "peak_memory_gib"),
    ):
        plots += section(title, lines([curve(title, key)], places, _told(title.lower(), metrics, key)), 3)
    skipped = [line["step"] for line in metrics if line.get("skipped")]
    more = f"<p>{len(skipped)} steps were skipped, the first is {skipped[0]}: not finite.</p>" if skipped else ""
    return f'<div class="grid">{plots}</div>{more}'


def _told(name: str, metrics: Sequence[Line], key: str) -> str:
    """A curve for those who don't see it."""
    values = [line[key] for line in metrics if line.get(key) is not None]
    if not values:
        return name
    ends = f"first {values[0]:.4g}, last {values[-1]:.4g}, from {min(values):.4g} to {max(values):.4g}"
    return f"{name} over {len(values)} steps: {ends}"


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours."""
    size = -(-len(points) // most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _evaluation(known: ReportData) -> str:
    found = known.comparison
    if found is None:
        return ""
    head, rows = figure_rows(found)
    told = table("figures of base and tuned model", head, rows) + f"<p>{escape(counted(found))}</p>"
    told += items(found.verdict) + items(gate_lines(found.gates))
    directory = storage.join(known.run_dir, "evaluate")
    speed = storage.find_object(storage.join(directory, "speed.json")) or {}
    more = "\n".join(details(found, speed)).strip("\n")
    told += f"<pre>{escape(more)}</pre>" if more else ""
    uri = storage.join(directory, "generations.jsonl")
    answers = storage.read_bytes(uri).splitlines()[:SAMPLES] if storage.exists(uri) else []
    samples = "".join(_sample(storage.parse_object(line)) for line in answers)
    return told + section(f"The first {len(answers)} answers, side by side", samples, 3, "long")


def _sample(line: Line) -> str:
    asked = facts([("question", _cut(line["question"])), ("reference", _cut(line["reference"]))])
    names = [name for name in ("base", "few_shot", "tuned") if name in line]
    said = "".join(facts([(name.replace("_", "-"), _cut(line[name]))]) for name in names)
    return f'<div class="sample">{asked}<div class="grid">{said}</div></div>'


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARS else f"{text[:SAMPLE_CHARS]}…"


def _sweep(known: ReportData) -> str:
    state = known.sweep
    winner = state.winner() if state is not None else None
    if state is None or winner is None:
        return ""
    uri = storage.join(known.run_dir, "tune", "results.json")
    tree = storage.find_object(uri) or {}
    found = tree.get("importance")
    importance = (found["share_of_steps"], found["keys"]) if found else None
    return render_sweep(state, winner, importance, tree.get("best", {}).get("command", ""), level=3)


def _data(known: ReportData) -> str:
    """Sources, counts, drops, lengths, from the index that the run was trained by."""
    data_hash = known.newest.meta["data_hash"] if known.newest else known.sweep.data_hash if known.sweep else ""
    directory = storage.join(known.run_dir, "data")
    stream, heldout_stream = streams(known.run.data, dict)  # no tokenizer is loaded: nothing is read
    indexes = [read_index(directory, each) for each in data_hash.split("-") if each]
    if not indexes or indexes[0] is None:
        return "<p>This directory holds no index of the data.</p>" if known.newest else ""
    told = _sources(known.run, indexes[0])
    parts = []
    for name, each, index in zip(("train", "eval"), (stream, heldout_stream), indexes, strict=False):
        if each is not None and index is not None and index.total("num_records") <= MAX_RECORDS:
            try:
                parts.append(collect(each, index, read_survey(index, directory), name, known.run.data.labels))
            except DataError as err:
                return told + f"<p>{escape(str(err))}</p>"
    if not parts or parts[0].name != "train":
        return told + "<p>Lengths, labels and copies: ftray data stats.</p>"
    heldout = parts[1] if len(parts) > 1 else None
    warnings = warn(parts[0], heldout, known.run.train.global_batch_size)
    return told + render_parts(DatasetStats(parts[0], heldout, warnings), level=3)


def _sources(run: config.RunConfig, index: Index) -> str:
    rows = []
    for number, found in groupby(index.facts, key=lambda f: f.chunk.source):
        chunks, source = list(found), run.data.train[number]
        totals = [sum(getattr(f, name) for f in chunks) for name in ("num_records", "num_tokens", "num_rows")]
        weight = "–" if source.weight is None else f"{source.weight:g}"
        rows.append([source.path, f"{len({f.chunk.uri for f in chunks}):,}", weight, *(f"{n:,}" for n in totals)])
    return table("training sources", ["source", "files", "weight", "records", "tokens", "rows"], rows)


def _history(history: RunHistory) -> str:
    rows = as_rows(history)
    if not rows:
        return ""
    return table("what happened", ["time (UTC)", "what happened"], rows, texts=1)


def _environment(known: ReportData) -> list[tuple[str, str]]:
    identity = known.identity
    told = [("config hash", identity.get("config_hash", "")), ("directory", known.run_dir)]
    if known.newest is not None:
        told.append(("data hash", known.newest.meta["data_hash"]))
    if identity.get("parent"):
        told.append(("started from", identity["parent"]))
    if lineage := identity.get("lineage"):
        where = lineage["environment"]
        told.append(("lineage", lineage["id"]))
        told.append(("ftray's code", where["code"]["commit"] or where["code"]["sha256"]))
        told.append(("machine", ", ".join(filter(None, (where["cpu"], f"Python {where['python']}", where["image"])))))
        told += [(f"from step {c['step']}", "; ".join(c["changes"])) for c in lineage.get("continued", [])]
    devices = {f"{start.workers} × {start.device}" for start in _starts(known.history)}
    told += [("workers", ", ".join(sorted(devices)))] if devices else []
    told.append(("versions", ", ".join(f"{name} {version}" for name, version in identity.get("versions", {}).items())))
    return [(name, text) for name, text in told if text]


def _settings(run: config.RunConfig) -> str:
    """The settings that are not the defaults, as a run file."""
    text: str = yaml.safe_dump(run.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    return text


def report_to(run: config.RunConfig, run_dir: str, console: Console, path: str | None) -> None:
    """The verb: writes the report beside the run, or to a file; says where."""
    known = read_known(run, run_dir)
    for each in known.damaged:
        console.warn(each)
    where = storage.join(run_dir, "report.html") if path is None else str(Path(path))
    storage.write_bytes(storage.absolute(where), render_report(known).encode())
    console.say(f"report: {where}")
