"""Commands that evaluate: `evaluate`, `evaluate human` and `evaluate judge`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from ftray.cli.context import Overrides, RunTarget, Step, at_most_one, command, open_target, owned, reported
from ftray.console import Console


@command(is_work=True, starts_ray=True)
def evaluate(target: RunTarget, overrides: Overrides = None, step: Step = None, *, console: Console) -> int:
    """Compare the tuned model with its base on the eval data."""
    from ftray import storage
    from ftray.driver.preflight import check_evaluation

    run = open_target(target, overrides)
    check_evaluation(run, storage.absolute(run.directory), step)
    with owned(run, console) as (run_dir, lease):
        from ftray.evaluate.run import compare

        with reported(run, run_dir, console, lease):
            comparison, _ = compare(run, run_dir, console, step)
    comparison.check_gates()
    return 0


@command()
def evaluate_human(
    target: RunTarget,
    overrides: Overrides = None,
    csv: Annotated[
        str | None, Option(metavar="FILE", help="Write the sheet as a CSV file to fill in, instead of serving a page.")
    ] = None,
    import_: Annotated[str | None, Option("--import", metavar="FILE", help="Read a filled CSV file.")] = None,
    results: Annotated[bool, Option("--results", help="Only show the results so far.")] = False,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8100,
    *,
    console: Console,
) -> int:
    """Have people compare the answers of both models, blinded."""
    from ftray.evaluate.human.server import HumanEvalOptions, human

    at_most_one(csv=csv, import_=import_, results=results)
    options = HumanEvalOptions(csv, import_, results, host, port)
    human(open_target(target, overrides), options, console)
    return 0


@command()
def evaluate_judge(target: RunTarget, overrides: Overrides = None, *, console: Console) -> int:
    """Have another model compare the answers of both models (evaluate.judge)."""
    from ftray.evaluate.judge import judge

    judge(open_target(target, overrides), console)
    return 0
