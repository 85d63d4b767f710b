"""The verbs `evaluate`, `evaluate human` and `evaluate judge`."""

from __future__ import annotations

import argparse

from ftray.cli.context import open_target, owned, reported
from ftray.console import Console


def evaluate(arguments: argparse.Namespace, console: Console) -> int:
    """Compares the tuned model with its base."""
    from ftray import storage
    from ftray.driver.preflight import check_evaluation

    run = open_target(arguments.run, arguments.overrides)
    check_evaluation(run, storage.absolute(run.directory), arguments.step)
    with owned(run, console) as (run_dir, lease):
        from ftray.evaluate.run import compare

        with reported(run, run_dir, console, lease):
            comparison, _ = compare(run, run_dir, console, arguments.step)
    comparison.check_gates()
    return 0


def evaluate_human(arguments: argparse.Namespace, console: Console) -> int:
    """Has people compare the answers, blinded."""
    from ftray.evaluate.human.commands import HumanEvalOptions, human

    typed = HumanEvalOptions(arguments.csv, arguments.filled, arguments.results, arguments.host, arguments.port)
    human(open_target(arguments.run, arguments.overrides), typed, console)
    return 0


def evaluate_judge(arguments: argparse.Namespace, console: Console) -> int:
    """Has another model compare the answers."""
    from ftray.evaluate.judge import judge

    judge(open_target(arguments.run, arguments.overrides), console)
    return 0
