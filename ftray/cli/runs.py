"""Commands that manage runs: `runs list`, `runs rm`, `runs compare`, `runs gc`."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated

from typer import Argument, BadParameter, Option

from ftray.cli.context import AsJson, command, open_target
from ftray.console import Console
from ftray.errors import ConfigError


@command()
def list_(
    directory: Annotated[str, Argument(help="Directory that holds runs, local or s3://.")] = "runs",
    as_json: AsJson = False,
    *,
    console: Console,
) -> int:
    """List runs: state, step, best eval loss, base, method."""
    from dataclasses import asdict

    from ftray.driver.run_list import describe_runs

    runs = describe_runs(directory, console.warn)
    if as_json:
        console.say(json.dumps([asdict(run) for run in runs], indent=1))
        return 0
    rows = [["run", "state", "step", "eval loss", "method", "base"]]
    for run in runs:
        loss = "–" if run.eval_loss is None else f"{run.eval_loss:.4f}"
        rows.append([run.name, run.state, str(run.step), loss, run.method, run.base])
    console.table(rows)
    return 0


@command()
def rm(
    run: Annotated[str, Argument(help="Directory of a run, local or s3://.", show_default=False)],
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
    *,
    console: Console,
) -> int:
    """Delete a run with its checkpoints, metrics and model."""
    from ftray import storage

    run_dir = storage.absolute(run)
    if not storage.exists(storage.join(run_dir, "run.json")):
        raise ConfigError(f"{run} is not the directory of a run (it has no run.json); correct the path")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"deleting {run_dir} needs an answer; add --yes")
        console.say(f"Delete {run_dir} with all checkpoints? [y/N] ")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            console.say("nothing was deleted")
            return 0
    with storage.acquire_lease(run_dir, warn=console.warn):
        pass  # nobody uses it
    storage.delete_tree(run_dir)
    console.say(f"deleted {run_dir}")
    return 0


@command()
def compare(
    one: Annotated[str, Argument(help="Directory of a run (local or s3://), or its run file.", show_default=False)],
    other: Annotated[str, Argument(help="The run to compare it with.", show_default=False)],
    *,
    console: Console,
) -> int:
    """Compare two runs: settings, data, packages, metrics."""
    from ftray import storage
    from ftray.report.compare_runs import differences, metric_rows
    from ftray.report.run_report import read_report_data

    runs = [open_target(target) for target in (one, other)]
    artifacts = [read_report_data(run, storage.absolute(run.directory)) for run in runs]
    for each in artifacts:
        for text in each.damaged:
            console.warn(text)
    for line in differences(*artifacts):
        console.say(line)
    console.say()
    console.table(metric_rows(*artifacts))
    return 0


def _hours(hours: float) -> float:
    if not 0 <= hours < math.inf:
        raise BadParameter(f"{hours} is not a number of hours")
    return hours


@command()
def gc(
    directory: Annotated[
        str, Argument(help="Directory of a run, or one that holds runs (local or s3://).", show_default=False)
    ],
    dry_run: Annotated[bool, Option("--dry-run", help="Only show what would be deleted.")] = False,
    older_than: Annotated[
        float, Option(metavar="HOURS", callback=_hours, help="Delete only files older than this.")
    ] = 1.0,
    *,
    console: Console,
) -> int:
    """Delete files that no run needs any more."""
    from ftray.driver.garbage_collection import collect_garbage

    collect_garbage(directory, older_than * 3600, dry_run, console)
    return 0
