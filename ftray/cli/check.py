"""The verb `check`, and what of it other verbs ask before they begin."""

from __future__ import annotations

import argparse
import json
import os

from ftray import config
from ftray.cli.context import open_target
from ftray.console import Console


def check(arguments: argparse.Namespace, console: Console) -> int:
    """Reads a run file and prints what follows from it."""
    from ftray import storage
    from ftray.driver.trackers import check_trackers
    from ftray.report.gpu_specs import check_accelerator
    from ftray.train.zero.config import deepspeed_config

    run = open_target(arguments.run, arguments.overrides)
    deepspeed_config(run.train, run.deepspeed, run.micro_batch_size, run.world_sizes[0])
    check_accelerator(run)
    is_here = (
        not storage.is_remote(run.storage) and "RAY_ADDRESS" not in os.environ
    )  # else this may be no machine of the run's
    if is_here:
        check_trackers(run)
    sweep = None
    if run.tune is not None:
        from ftray.tune.space import check_tune, describe

        sweep = describe(check_tune(run))
    check_serving(run, is_here=is_here)
    if arguments.json:
        console.say(json.dumps(run.model_dump(mode="json"), indent=1))
        return 0
    data = run.data
    held_out = (
        "none"
        if data.eval is None
        else f"{data.eval.fraction:g} of the records"
        if isinstance(data.eval, config.SplitConfig)
        else f"{len(data.eval)} sources"
    )
    length = (
        f"{run.train.max_steps} steps"
        if run.train.max_steps
        else f"{run.train.epochs:g} epochs; steps are known after the index pass"
    )
    epoch = (
        "one pass over the source that is largest relative to its weight; others repeat or stop short"
        if data.train[0].weight
        else "every record once; rows that fill no global batch are carried into the next epoch, or left out at the end"
    )
    every = f"{run.checkpoint.every} steps" if isinstance(run.checkpoint.every, int) else run.checkpoint.every
    for name, text in (
        ("run", f"{run.directory}  (config hash {run.config_hash})"),
        ("model", f"{run.model.base}, {run.method.type}, {run.train.precision}"),
        ("data", f"{len(data.train)} training sources, held out: {held_out}"),
        ("rows", f"{data.max_seq_len} tokens, {'packed' if data.packing else 'one record each'}"),
        ("epoch", epoch),
        ("length", length),
        ("step", f"{run.train.global_batch_size} rows = {_parts(run)}"),
        ("tokens", f"at most {run.train.global_batch_size * data.max_seq_len} a step"),
        ("DeepSpeed", f"ZeRO stage {run.deepspeed.zero_stage}, offloaded to host memory: {run.deepspeed.offload}"),
        ("checkpoint", f"every {every}, the newest {run.checkpoint.keep} and the best are kept"),
        *([("tune", sweep)] if sweep else []),
    ):
        console.say(f"{name:<11}{text}")
    return 0


def check_serving(run: config.RunConfig, *, is_here: bool) -> None:
    """Raises ConfigError for an endpoint that could not start. is_here: it would on this machine."""
    from ftray.serve.preflight import check_holds, check_installed

    if run.method.type == "prompt-tuning":  # not served
        return
    made = [run]
    if run.tune is not None:
        from ftray.tune.space import corners, trial_run

        made = [trial_run(run, params, "trial", run.storage) for params in corners(run.tune)]
    for each in made:
        check_holds(each)
    if is_here:
        check_installed(run.serve)


def check_trackers(run: config.RunConfig) -> None:
    """Raises ConfigError for a tracker that could not be told from here, where the command runs."""
    from ftray.driver.trackers import check_trackers

    check_trackers(run)


def _parts(run: config.RunConfig) -> str:
    parts = f"{run.world_sizes[0]} workers × micro-batch {run.micro_batch_size} × {run.accumulation_steps} accumulated"
    return parts if len(run.world_sizes) == 1 else f"{parts} (or {', '.join(map(str, run.world_sizes[1:]))} workers)"
