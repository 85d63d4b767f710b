"""The command line: what may be typed, and errors as one line with an exit code. What a verb does is in `verbs`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from ftray import serving, verbs
from ftray.console import Console
from ftray.errors import FtrayError, Interrupted, innermost


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code (see `errors`)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.overrides += rest  # key=value behind an option, where argparse doesn't look for it any more
    console = Console()
    try:
        code: int = arguments.verb(arguments, console)
        return code
    except Exception as err:
        known = innermost(err)  # what a Ray task raised arrives wrapped
        if not isinstance(known, FtrayError):
            raise
        print(f"ftray: {known}", file=sys.stderr)
        return known.exit_code
    except KeyboardInterrupt:
        start = "\n" if sys.stderr.isatty() else ""  # below the terminal's ^C
        print(f"{start}ftray: interrupted; run the same command again to continue", file=sys.stderr)
        return Interrupted.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ftray", description="Fine-tunes language models on Ray, from one YAML file.")
    commands = parser.add_subparsers(required=True, metavar="verb")

    def verb(name: str, function: object, text: str, among: Any = commands) -> argparse.ArgumentParser:
        sub = among.add_parser(name, help=text, description=text)
        sub.add_argument("run", help="run file (.yaml), or the directory of a run that was started")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.max_steps=10")
        sub.set_defaults(verb=function)
        return sub

    verb("run", verbs.run, "train, evaluate, export and try the endpoint: the whole file")
    verb("check", verbs.check, "read a run file and print what follows from it; no Ray, no GPU").add_argument(
        "--json", action="store_true", help="print the resolved run as JSON"
    )
    train = verb("train", verbs.train, "train, or continue a run")
    train.add_argument(
        "--from", dest="parent", metavar="CHECKPOINT", help="start a new run from a checkpoint's weights"
    )
    verb("evaluate", verbs.evaluate, "compare the tuned model with its base on the held-out data")
    verb("export", verbs.export, "write the adapter and the merged model")
    _add_serving_verbs(verb)
    _add_data_verbs(commands, verb)
    runs = commands.add_parser("runs", help="look after runs: gc", description="look after runs: gc")
    sub = runs.add_subparsers(required=True, metavar="action").add_parser("gc", help="sweep what no run needs any more")
    sub.add_argument("place", help="a run's directory, or one that holds runs (local or s3://)")
    sub.add_argument("--dry-run", action="store_true", help="only show what would go")
    sub.add_argument("--older-than", type=_hours, default=1.0, metavar="HOURS", help="keep what is younger (1)")
    sub.set_defaults(verb=verbs.runs_gc, overrides=[])
    return parser


def _add_serving_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    publish = verb(
        "publish", serving.publish, "make the run's adapter servable beside its base, under <storage>/published/"
    )
    publish.add_argument("--name", help="the adapter's name for clients; the run's if left out")
    publish.add_argument("--remove", action="store_true", help="take it away, all of its versions")
    text = "serve the base with the run's and all published adapters, OpenAI-compatible, until Ctrl-C"
    serve = verb("serve", serving.serve, text)
    serve.add_argument(
        "--config", action="store_true", help="print the config for `serve deploy` and RayService instead"
    )
    serve.epilog = "more runs, or directories of adapters, of the same base may follow the first"


def _add_data_verbs(commands: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    text = "look at a run's data: index, stats, preview, order"
    views = commands.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="view")
    verb("index", verbs.data_index, "read, check and count all data, and tell the steps of an epoch", views)
    stats = verb("stats", verbs.data_stats, "lengths, tokens, duplicates, packing, warnings", views)
    stats.add_argument("--html", metavar="FILE", help="write a page with plots, too")
    preview = verb("preview", verbs.data_preview, "show records as the model will see them; no Ray", views)
    preview.add_argument("--number", type=_from_one, default=3, help="records shown of each source (3)")
    order = verb("order", verbs.data_order, "show which rank takes which rows and records at which step", views)
    order.add_argument("--workers", type=_from_one, help="ranks; scale.num_workers if left out")
    order.add_argument("--steps", type=_steps, default=(0, 1), metavar="A:B", help="steps A … B - 1 (0:1)")
    order.add_argument("--after-step", type=int, metavar="N", help="start the feed as after a checkpoint of step N")
    order.add_argument("--json", action="store_true", help="one line of JSON for each step and rank")


def _from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up")
    return int(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 <= hours < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of hours")
    return hours


def _steps(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text} is no range of steps; write A:B with A below B, e.g. 0:10")
    return int(first), int(end)


if __name__ == "__main__":
    sys.exit(main())
