"""The verbs that look at runs: `plan`, `report`, `runs`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ftray import config
from ftray.cli.context import launch, open_target, owned
from ftray.console import Console

if TYPE_CHECKING:
    from ftray.report.plan import ProbeResult


def plan(arguments: argparse.Namespace, console: Console) -> int:
    """Says what a run will need: memory, steps, time, cost."""
    from ftray import storage
    from ftray.report.plan import make_plan
    from ftray.report.plan_text import as_text, as_tree

    run = open_target(arguments.run, arguments.overrides)
    run_dir = storage.absolute(run.directory)
    told = Console(sys.stderr) if arguments.json else console
    found = make_plan(run, run_dir, arguments.card, _probe(run, told) if arguments.probe else None)
    if arguments.json:
        console.say(json.dumps(as_tree(found), indent=1))
        return 0
    for line in as_text(found, run):
        console.say(line)
    return 0


def _probe(run: config.RunConfig, console: Console) -> ProbeResult:
    """Trains a few steps on the cluster, as a run that is deleted whatever comes of it."""
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


def report(arguments: argparse.Namespace, console: Console) -> int:
    """Writes all that is known of a run as one page."""
    from ftray import storage
    from ftray.report.run_report import report_to

    run = open_target(arguments.run, arguments.overrides)
    report_to(run, storage.absolute(run.directory), console, arguments.html)
    return 0


def compare(arguments: argparse.Namespace, console: Console) -> int:
    """Shows two runs side by side."""
    from ftray import storage
    from ftray.report.compare_runs import compare_known
    from ftray.report.run_report import read_known

    opened = [open_target(target, arguments.overrides) for target in (arguments.one, arguments.other)]
    known = [read_known(run, storage.absolute(run.directory)) for run in opened]
    for each in known:
        for text in each.damaged:
            console.warn(text)
    for line in compare_known(*known):
        console.say(line)
    return 0


def gc(arguments: argparse.Namespace, console: Console) -> int:
    """Sweeps what no run needs any more."""
    from ftray.driver.garbage_collection import sweep_place

    sweep_place(arguments.place, arguments.older_than * 3600, arguments.dry_run, console)
    return 0
