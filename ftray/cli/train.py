"""The verbs that train: `run`, `train`, `tune`, `reproduce`."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING

from ftray import config
from ftray.cli.check import check_serving, check_trackers
from ftray.cli.context import finished, launch, open_target, owned, reported
from ftray.console import Console

if TYPE_CHECKING:
    from ftray.evaluate.results import Comparison


def train(arguments: argparse.Namespace, console: Console) -> int:
    """Trains, or continues."""
    run = open_target(arguments.run, arguments.overrides)
    if run.tune is not None:
        console.say("the section tune is for `ftray tune` and `ftray run`: this trains the file's own settings")
    if (done := finished(run, verify=True)) is not None:
        console.say(f"training of '{run.name}' is complete ({done.step} steps): {done.uri}")
        return 0
    parent = None
    if arguments.parent is not None:
        from ftray.train.checkpoint.restore import open_parent

        parent = open_parent(arguments.parent).uri
    check_trackers(run)
    with owned(run, console, parent=parent) as (run_dir, lease):
        with reported(run, run_dir, console, lease):
            found = launch(run, run_dir, console, lease)
        console.say(
            f"done: {found.step} steps, checkpoint {found.uri}\nreport: {run_dir}/report.html\n"
            f"next: ftray evaluate {arguments.run}"
        )
    return 0


def tune(arguments: argparse.Namespace, console: Console) -> int:
    """Trains the run with different settings and names the best, or continues to."""
    _sweep(open_target(arguments.run, arguments.overrides), arguments.run, console)
    return 0


def _sweep(run: config.RunConfig, target: str, console: Console) -> config.RunConfig:
    """Runs the sweep of a run file; returns the winner's run."""
    from ftray.tune.space import check_tune

    trials = check_tune(run).max_concurrent or 1
    check_trackers(run)
    with owned(run, console, with_ray=False) as (run_dir, lease):
        from ftray.cli.session import ray_session
        from ftray.report.ray_metrics import TrainingMetrics
        from ftray.report.sweep_page import render_page
        from ftray.tune.runner import preflight_trials, sweep, winning_run

        preflight_trials(run)
        with ray_session(trials * run.world_sizes[-1] * run.scale.cpus_per_worker):
            winner = sweep(
                run,
                run_dir,
                console,
                target,
                lease,
                lambda trial: TrainingMetrics(trial, warn=console.warn, name=f"{run.name}/{trial.name}"),
                render_page=render_page,
            )
            return winning_run(run, run_dir, winner)


def reproduce(arguments: argparse.Namespace, console: Console) -> int:
    """Trains a run once more under another name, from what it was trained from, and compares."""
    from ftray import storage
    from ftray.report.reproduce import check_before, check_data, compare_runs, renamed, same_data

    old = open_target(arguments.run, arguments.overrides)
    old_dir = storage.absolute(old.directory)
    run = renamed(old, arguments.name)
    known = check_before(old, old_dir, arguments.other_environment, console)
    check_trackers(run)
    with owned(run, console, parent=known.get("parent")) as (run_dir, lease):
        check_data(known, run, same_data(run, run_dir, console))
        with reported(run, run_dir, console, lease):
            launch(run, run_dir, console, lease)
    console.say(compare_runs(old_dir, run_dir))
    return 0


def run(arguments: argparse.Namespace, console: Console) -> int:
    """The whole file, in order: tune, train, evaluate, export, one request to the endpoint."""
    run = open_target(arguments.run, arguments.overrides)
    from ftray.serve.smoke_test import known_answer

    if run.tune is not None:
        from ftray.tune.space import check_tune

        check_tune(run)
        check_serving(run, is_here="RAY_ADDRESS" not in os.environ)
        run = _sweep(run, arguments.run, console)
        arguments.run = run.directory  # the winner is a run like any other: what follows is done to it
    done = finished(run)
    answer = known_answer(run.directory, done.step) if done is not None else None
    is_served = run.method.type != "prompt-tuning"  # its adapter is for PEFT
    comparison = _known_comparison(run) if done is not None and run.evaluate.gates else None
    if done is None or answer is None or (run.evaluate.gates and comparison is None):
        check_serving(run, is_here="RAY_ADDRESS" not in os.environ)  # the endpoint comes last
        check_trackers(run)
        with owned(run, console) as (run_dir, lease):
            from ftray.evaluate.run import compare
            from ftray.report.model_card import described
            from ftray.serve.smoke_test import try_endpoint
            from ftray.train.export import export as write

            with reported(run, run_dir, console, lease):
                done = launch(run, run_dir, console, lease)
                question = "Hello"
                if run.data.eval is not None:
                    comparison, question = compare(run, run_dir, console)
            model_dir = write(run, run_dir, console, partial(described, run, run_dir))
            if is_served:
                answer = try_endpoint(run, run_dir, model_dir, done.step, question, console)
    _say_end(arguments, run, console, is_refused=comparison is not None and bool(comparison.missed))
    if comparison is not None:
        comparison.check_gates()
    return 0


def _known_comparison(run: config.RunConfig) -> Comparison | None:
    """What was found of the checkpoint that is exported, if it was compared by these settings."""
    from ftray import storage
    from ftray.evaluate.results import known_results
    from ftray.train.checkpoint.catalog import best_checkpoint

    run_dir = storage.absolute(run.directory)
    return known_results(run, run_dir, best_checkpoint(run_dir).step)


def _say_end(arguments: argparse.Namespace, run: config.RunConfig, console: Console, is_refused: bool) -> None:
    from ftray import storage

    directory = storage.absolute(run.directory)
    for line in (
        "",
        f"the run '{run.name}' is complete. Everything is in {directory}:",
        "  report.html             all of it on one page",
        "  checkpoints/            committed checkpoints      metrics.jsonl          a line for each step",
        "  evaluate/results.json   base against tuned         evaluate/generations.jsonl  answers side by side",
        "  model/                  the trained model"
        + {"full": "", "prompt-tuning": " (virtual tokens, for PEFT)"}.get(
            run.method.type, " (adapter)      model/merged/          whole weights"
        ),
        "",
        *(
            [f"serve it:               ftray serve {arguments.run}"]
            if run.method.type != "prompt-tuning" and not is_refused
            else []
        ),
        "train on your own data: cp jobs/quickstart.yaml my.yaml, set name and data.train in it, then: ftray run my.yaml",
    ):
        console.say(line)
