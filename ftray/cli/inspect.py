"""Commands that look at a run: `check`, `plan`, `report`."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ftray import config
from ftray.cli.context import AsJson, Overrides, RunTarget, command, launch, open_target, owned
from ftray.console import Console

if TYPE_CHECKING:
    from ftray.data.spot_check import SourceSample
    from ftray.report.plan import ProbeResult


@command()
def check(
    target: RunTarget,
    overrides: Overrides = None,
    fast: Annotated[bool, Option("--fast", help="Only the run file: look at no data and no model.")] = False,
    as_json: AsJson = False,
    *,
    console: Console,
) -> int:
    """Validate a run file, its base and a sample of its data; print the settings derived from it. Starts no Ray."""
    from ftray import storage
    from ftray.report.gpu_specs import check_accelerator
    from ftray.train.zero.config import deepspeed_config

    run = open_target(target, overrides)
    deepspeed_config(run.train, run.deepspeed, run.micro_batch_size, run.world_sizes[0])
    check_accelerator(run)
    is_local = not storage.is_remote(run.storage) and "RAY_ADDRESS" not in os.environ  # else the run may run elsewhere
    if is_local and run.tracking.trackers:
        from ftray.events.trackers import check_trackers

        check_trackers(run)
    sweep = None
    if run.tune is not None:
        from ftray.tune.space import check_tune, describe

        sweep = describe(check_tune(run))
    check_serving(run, is_local=is_local)
    samples = [] if fast else _look_at_data(run, Console(sys.stderr) if as_json else console)
    if as_json:
        console.say(json.dumps(run.model_dump(mode="json"), indent=1))
        return 0
    for name, text in [*_summary(run, sweep), *samples]:
        console.say(f"{name:<11}{text}")
    return 0


def _look_at_data(run: config.RunConfig, console: Console) -> list[tuple[str, str]]:
    """Reads a sample of each source and checks the base; prints warnings. Returns pairs of a name and a text."""
    from functools import partial

    from ftray.data import spot_check
    from ftray.data.chunks import streams
    from ftray.driver.preflight import preflight
    from ftray.evaluate.plan import check_inputs
    from ftray.model.load import load_tokenizer

    preflight(run)
    check_inputs(run)
    train, evals = streams(run.data, partial(load_tokenizer, run.model), run.evaluate.slices)
    is_split = isinstance(run.data.eval, config.SplitConfig)
    samples = spot_check.sample_sources(train, run.data.max_bad_records)
    others = [] if evals is None or is_split else spot_check.sample_sources(evals, run.data.max_bad_records)
    for sentence in spot_check.compare(samples, others, is_split):
        console.warn(sentence)
    return [("sample", _describe(sample)) for sample in [*samples, *others]]


def _describe(sample: SourceSample) -> str:
    num_records, num_files = len(sample.lengths), sample.num_files
    return (
        f"{sample.path}: {num_records} record{'s' * (num_records > 1)} of {num_files} file{'s' * (num_files > 1)}, "
        f"{min(sample.lengths)} to {max(sample.lengths)} tokens, {sample.median_length} in the middle"
    )


def _summary(run: config.RunConfig, sweep: str | None) -> list[tuple[str, str]]:
    """What follows from a run file, as pairs of a name and a text."""
    data, train = run.data, run.train
    if data.eval is None:
        eval_data = "none"
    elif isinstance(data.eval, config.SplitConfig):
        eval_data = f"{data.eval.fraction:g} of the records"
    else:
        eval_data = f"{len(data.eval)} sources"
    length = (
        f"{train.max_steps} steps"
        if train.max_steps
        else f"{train.epochs:g} epochs; `ftray data index` counts their steps"
    )
    epoch = (
        "one pass over the source that is largest relative to its weight; others repeat or stop early"
        if data.train[0].weight
        else "each record once; an incomplete global batch carries over to the next epoch, or is dropped at the end"
    )
    every = f"{run.checkpoint.every} steps" if isinstance(run.checkpoint.every, int) else run.checkpoint.every
    batch = f"{run.world_sizes[0]} workers × micro-batch {run.micro_batch_size} × {run.accumulation_steps} accumulated"
    if len(run.world_sizes) > 1:
        batch += f" (or {', '.join(map(str, run.world_sizes[1:]))} workers)"
    return [
        ("run", f"{run.directory}  (config hash {run.config_hash})"),
        ("model", f"{run.model.base}, {run.method.type}, learning rate {train.learning_rate:g}, {train.precision}"),
        ("data", f"{len(data.train)} training sources, eval: {eval_data}"),
        ("sequences", f"{data.max_seq_len} tokens, {'packed' if data.packing else 'one record each'}"),
        ("epoch", epoch),
        ("length", length),
        ("step", f"{train.global_batch_size} packed sequences = {batch}"),
        ("tokens", f"at most {train.global_batch_size * data.max_seq_len} per step"),
        ("DeepSpeed", f"ZeRO stage {run.deepspeed.zero_stage}, CPU offload: {run.deepspeed.offload}"),
        ("checkpoint", f"every {every}; keeps the newest {run.checkpoint.keep} and the best"),
        *([("tune", sweep)] if sweep else []),
    ]


def check_serving(run: config.RunConfig, *, is_local: bool) -> None:
    """Raises ConfigError if the endpoint of this run could not start.

    Args:
        run: The run.
        is_local: The endpoint would start on this machine, so installed packages count.
    """
    from ftray.serve.preflight import check_holds, check_installed

    if run.method.type == "prompt-tuning":  # not served
        return
    runs = [run]
    if run.tune is not None:
        from ftray.tune.space import corners, trial_run

        runs = [trial_run(run, params, "trial", run.storage) for params in corners(run.tune)]
    for trial in runs:
        check_holds(trial)
    if is_local:
        check_installed(run.serve)


@command(starts_ray=lambda options: bool(options["probe"]))
def plan(
    target: RunTarget,
    overrides: Overrides = None,
    card: Annotated[
        str | None, Option(help="GPU to plan for, such as H100 or A100-80G. Default: scale.accelerator.")
    ] = None,
    probe: Annotated[
        bool, Option("--probe", help="Measure the speed with a few training steps on the cluster, which are discarded.")
    ] = False,
    as_json: AsJson = False,
    *,
    console: Console,
) -> int:
    """Estimate memory, time and cost of a run. Starts no Ray, unless --probe is set."""
    from ftray import storage
    from ftray.report.plan import make_plan
    from ftray.report.plan_text import as_text, as_tree

    run = open_target(target, overrides)
    run_dir = storage.absolute(run.directory)
    messages = Console(sys.stderr) if as_json else console
    result = make_plan(run, run_dir, card, _probe(run, messages) if probe else None)
    if as_json:
        console.say(json.dumps(as_tree(result), indent=1))
        return 0
    for line in as_text(result, run):
        console.say(line)
    return 0


def _probe(run: config.RunConfig, console: Console) -> ProbeResult:
    """Trains a few steps on the cluster as a temporary run, which is always deleted."""
    from ftray import storage
    from ftray.events.event_log import read_events
    from ftray.report.probe import STEPS, probe_of, probed
    from ftray.train.checkpoint.catalog import read_metrics

    trial = probe_of(run)
    console.say(f"probe: {STEPS} steps of the run, as '{trial.name}', which is deleted afterwards")
    try:
        with owned(trial, console) as (run_dir, lease):
            launch(trial, run_dir, console, lease)
            return probed(read_metrics(run_dir), read_events(run_dir))
    finally:
        storage.delete_tree(storage.absolute(trial.directory))


@command()
def report(
    target: RunTarget,
    overrides: Overrides = None,
    html: Annotated[str | None, Option(metavar="FILE", help="Write the page there instead.")] = None,
    *,
    console: Console,
) -> int:
    """Write the run's report, <run>/report.html. Starts no Ray."""
    from ftray import storage
    from ftray.report.run_report import report_to

    run = open_target(target, overrides)
    report_to(run, storage.absolute(run.directory), console, html)
    return 0
