"""The command line: what may be typed, and errors as one line with an exit code. What a verb does is in `verbs`."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from ftray.cli import check, cluster, data, evaluate, inspect
from ftray.cli import export as exporting
from ftray.cli import serve as serving
from ftray.cli import train as training
from ftray.cli.child_process import run_in_child
from ftray.console import Console, escaped, json_line, outlive_terminal, printable
from ftray.errors import ConfigError, FtrayError, Interrupted, Preempted, innermost
from ftray.redact import redacted
from ftray.signals import termination_signals

WORK = (
    training.run,
    training.train,
    training.tune,
    evaluate.evaluate,
    exporting.export,
    training.reproduce,
    serving.serve,
)
STARTS_RAY = (*WORK, data.index, data.stats, data.order)
RESUMED = (training.run, training.train, training.tune, training.reproduce)  # go on by themselves when their Ray died


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code (see `errors`)."""
    parser = _parser()
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["evaluate"] and words[1:2] in (["human"], ["judge"]):  # a verb of two words; ./human is a run
        words = [" ".join(words[:2]), *words[2:]]
    arguments, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.overrides += rest  # key=value behind an option, where argparse doesn't look for it any more
    try:
        as_json = _logs_json(arguments)
    except FtrayError as err:
        print(f"ftray: {escaped(redacted(str(err)))}", file=sys.stderr)
        return err.exit_code
    console = Console(as_json=as_json)

    def fail(text: str, before: str = "", **what: Any) -> None:
        shown = json_line("failed", text, "error", console.run, None, console.step, **what)
        stream = outlive_terminal(sys.stderr)
        print(shown if as_json else f"{before}ftray: {escaped(redacted(text))}", file=stream, flush=True)

    def work() -> int:
        return _run(arguments, console, fail)

    if argv is None and _starts_ray(arguments):
        return run_in_child(work, console.warn, lambda text: fail(text, exit_code=1), int(arguments.verb in RESUMED))
    return work()


def _run(arguments: argparse.Namespace, console: Console, fail: Callable[..., None]) -> int:
    """The command itself, in this process."""
    as_json = console.as_json
    in_main = threading.current_thread() is threading.main_thread()
    kept = {n: signal.signal(n, _preempted) for n in termination_signals()} if in_main else {}
    try:
        code: int = arguments.verb(arguments, console)
        return code
    except Exception as err:  # noqa: BLE001 - a fault of ftray's: its traceback is shown without secrets
        if isinstance(err, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        known = innermost(err)  # what a Ray task raised arrives wrapped
        if isinstance(known, FtrayError):
            fail(str(known), exit_code=known.exit_code)
            return known.exit_code
        trace = "".join(traceback.format_exception(err))
        if as_json:
            fail(f"{type(known).__name__}: {known}", exit_code=1, traceback=trace)
        else:
            print(printable(redacted(trace)), file=sys.stderr, end="")
        return 1
    except KeyboardInterrupt:
        start = "\n" if sys.stderr.isatty() else ""  # below the terminal's ^C
        fail("interrupted; run the same command again to continue", start, exit_code=Interrupted.exit_code)
        return Interrupted.exit_code
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _starts_ray(arguments: argparse.Namespace) -> bool:
    """Whether the command may start a Ray of its own, which it then has to outlive; what that takes is Linux' own."""
    if sys.platform != "linux":
        return False
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        return False
    return arguments.verb in STARTS_RAY or (arguments.verb is inspect.plan and arguments.probe)


def _nobody_reads() -> bool:
    """Whether the command's output is a closed pipe, as `| head` leaves it; nothing more is then written there."""
    look = select.poll()
    look.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(flags & select.POLLERR for _, flags in look.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _logs_json(arguments: argparse.Namespace) -> bool:
    """Whether lines are to be JSON: FTRAY_LOG asks for it, and the verb works, instead of answering a question."""
    wanted = os.environ.get("FTRAY_LOG", "text")
    if wanted not in ("json", "text"):
        raise ConfigError(f"FTRAY_LOG is {wanted}; use json, text, or unset it")
    return wanted == "json" and arguments.verb in WORK


def _preempted(*_: object) -> None:
    raise Preempted("preempted; run the same command again to continue")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ftray", description="Fine-tunes language models on Ray, from one YAML file.")
    commands = parser.add_subparsers(required=True, metavar="verb")

    def verb(name: str, function: object, text: str, among: Any = commands) -> argparse.ArgumentParser:
        sub = among.add_parser(name, help=text, description=text)
        sub.add_argument("run", help="run file (.yaml), or the directory of a run that was started")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.max_steps=10")
        sub.set_defaults(verb=function)
        return sub

    verb("run", training.run, "tune, train, evaluate, export and try the endpoint: the whole file")
    verb("check", check.check, "read a run file and print what follows from it; no Ray, no GPU").add_argument(
        "--json", action="store_true", help="print the resolved run as JSON"
    )
    plan = verb(
        "plan",
        inspect.plan,
        "say whether a run fits, how long it takes and what it costs; no Ray, no GPU, but for --probe",
    )
    plan.add_argument("--card", help="GPU to plan for, e.g. H100 or A100-80G; scale.accelerator if left out")
    plan.add_argument(
        "--probe", action="store_true", help="train a few steps on the cluster, thrown away, for its speed"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    train = verb("train", training.train, "train, or continue a run")
    train.add_argument(
        "--from", dest="parent", metavar="CHECKPOINT", help="start a new run from a checkpoint's weights"
    )
    verb("tune", training.tune, "try settings: train trials of the run, compare them, name the best")
    _add_step(verb("evaluate", evaluate.evaluate, "compare the tuned model with its base on the held-out data"))
    _add_opinion_verbs(verb)
    report = verb("report", inspect.report, "write all that is known of a run as one page, <run>/report.html; no Ray")
    report.add_argument("--html", metavar="FILE", help="write it there instead")
    again = verb(
        "reproduce", training.reproduce, "train a run once more under another name, if nothing changed, and compare"
    )
    again.add_argument("--name", help="name of the new run; <run>-again if left out")
    again.add_argument(
        "--other-environment", action="store_true", help="go on where packages, Python or the kind of CPU differ"
    )
    _add_export(verb)
    _add_serving_verbs(verb)
    _add_data_verbs(commands, verb)
    _add_cluster_verbs(commands, verb)
    text = "look after runs: compare, gc"
    runs = commands.add_parser("runs", help=text, description=text).add_subparsers(required=True, metavar="action")
    both = runs.add_parser("compare", help="two runs side by side: settings, data, packages, figures")
    both.add_argument("one", help="a run's directory (local or s3://), or its run file")
    both.add_argument("other", help="another")
    both.set_defaults(verb=inspect.compare, overrides=[])
    sub = runs.add_parser("gc", help="sweep what no run needs any more")
    sub.add_argument("place", help="a run's directory, or one that holds runs (local or s3://)")
    sub.add_argument("--dry-run", action="store_true", help="only show what would go")
    sub.add_argument("--older-than", type=_hours, default=1.0, metavar="HOURS", help="keep what is younger (1)")
    sub.set_defaults(verb=inspect.gc, overrides=[])
    return parser


def _add_opinion_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    human = verb("evaluate human", evaluate.evaluate_human, "have people compare both models' answers, blinded")
    what = human.add_mutually_exclusive_group()
    what.add_argument("--csv", metavar="FILE", help="write the sheet as CSV to be filled in, instead of serving a page")
    what.add_argument("--import", dest="filled", metavar="FILE", help="read a filled CSV")
    what.add_argument("--results", action="store_true", help="only show what was said so far")
    human.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    human.add_argument("--port", type=_port, default=8100, help="port to listen on; 0 takes a free one (8100)")
    verb("evaluate judge", evaluate.evaluate_judge, "have another model compare both models' answers (evaluate.judge)")


def _add_export(verb: Callable[..., argparse.ArgumentParser]) -> None:
    export = verb(
        "export", exporting.export, "write the adapter and the merged model; in fewer bits, as GGUF, to the hub"
    )
    _add_step(export)
    form = export.add_mutually_exclusive_group()
    form.add_argument(
        "--quantize",
        choices=("nf4", "int8", "fp8"),
        help="write the merged model in fewer bits, too, and what that costs",
    )
    form.add_argument("--to", choices=("gguf",), help="write the merged model as a file for llama.cpp, too")
    form.add_argument("--merged", action="store_true", help="with --push: the merged model, instead of its adapter")
    export.add_argument("--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, where it isn't on PATH")
    export.add_argument("--push", metavar="hub:org/name", help="upload what was written to the Hugging Face hub")


def _add_step(sub: argparse.ArgumentParser) -> None:
    text = "take the checkpoint of step N; the best by held-out loss, else the newest, if left out"
    sub.add_argument("--step", type=_from_one, metavar="N", help=text)


def _add_serving_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    publish = verb(
        "publish", serving.publish, "make the run's adapter servable beside its base, under <storage>/published/"
    )
    publish.add_argument("--name", help="the adapter's name for clients; the run's if left out")
    publish.add_argument("--remove", action="store_true", help="take it away, all of its versions")
    publish.add_argument(
        "--list", action="store_true", help="show what is published for the base, and what is not served"
    )
    publish.add_argument(
        "--sign", metavar="KEYFILE", help="sign it with this Ed25519 key (PEM); see serve.trusted_keys"
    )
    publish.add_argument("--owner", help="who publishes; FTRAY_OWNER or the login name if left out")
    publish.add_argument(
        "--take-over", action="store_true", help="publish or remove it though the name is another owner's"
    )
    text = "serve the base with the run's and all published adapters, OpenAI-compatible, until Ctrl-C"
    serve = verb("serve", serving.serve, text)
    serve.add_argument(
        "--config", action="store_true", help="print the config for `serve deploy` and RayService instead"
    )
    serve.epilog = "more runs, or directories of adapters, of the same base may follow the first"


def _add_data_verbs(commands: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    text = "look at a run's data: index, stats, preview, order"
    views = commands.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="view")
    verb("index", data.index, "read, check and count all data, and tell the steps of an epoch", views)
    stats = verb("stats", data.stats, "lengths, tokens, duplicates, packing, warnings", views)
    stats.add_argument("--html", metavar="FILE", help="write a page with plots, too")
    preview = verb("preview", data.preview, "show records as the model will see them; no Ray", views)
    preview.add_argument("--number", type=_from_one, default=3, help="records shown of each source (3)")
    order = verb("order", data.order, "show which rank takes which rows and records at which step", views)
    order.add_argument("--workers", type=_from_one, help="ranks; scale.num_workers if left out")
    order.add_argument("--steps", type=_steps, default=(0, 1), metavar="A:B", help="steps A … B - 1 (0:1)")
    order.add_argument("--after-step", type=int, metavar="N", help="start the feed as after a checkpoint of step N")
    order.add_argument("--json", action="store_true", help="one line of JSON for each step and rank")


def _add_cluster_verbs(commands: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    text = "Kubernetes: render"
    pods = commands.add_parser("k8s", help=text, description=text).add_subparsers(required=True, metavar="action")
    render = verb("render", cluster.k8s_render, "write KubeRay manifests for a run file", pods)
    render.add_argument("-o", dest="directory", metavar="DIR", help="write files there, instead of printing")
    render.add_argument("--machine", help="kind of machine, e.g. p4de.24xlarge; by scale.accelerator if left out")
    render.add_argument("--image", help="container image; ftray:<version>-cuda or -cpu if left out")
    render.add_argument(
        "--parts",
        type=lambda text: tuple(text.split(",")),
        metavar="LIST",
        help="comma-separated parts; all but raycluster by default",
    )
    render.add_argument("--role-arn", metavar="ARN", help="AWS role that pods of this run assume (IRSA)")
    at = "the cluster's dashboard, http://head:8265; RAY_API_SERVER_ADDRESS if left out"
    submit = verb("submit", cluster.submit, "run a file as a job of a Ray cluster, and follow it")
    plain = "send the cluster's token over http also to another machine"
    submit.add_argument("--address", help=at)
    submit.add_argument("--insecure", action="store_true", help=plain)
    submit.add_argument(
        "--verb", dest="what", default="run", choices=("run", "train", "evaluate", "export"), help="what it does (run)"
    )
    submit.add_argument("--no-wait", action="store_true", help="don't follow the job")
    submit.add_argument(
        "--wait-for-nodes", action="store_true", help="where the cluster starts machines: wait for them"
    )
    submit.add_argument("--no-check", action="store_true", help="don't look at the cluster first")
    jobs = {}
    for name, function, text in (
        ("status", cluster.job_status, "jobs of a cluster, or of one run"),
        ("logs", cluster.job_logs, "what a job printed"),
        ("stop", cluster.job_stop, "end a job; it commits a checkpoint"),
    ):
        jobs[name] = commands.add_parser(name, help=text, description=text)
        jobs[name].add_argument("name", nargs="?" if name == "status" else None, help="a run, or a job (<run>-<n>)")
        jobs[name].add_argument("--address", help=at)
        jobs[name].add_argument("--insecure", action="store_true", help=plain)
        jobs[name].set_defaults(verb=function, overrides=[])
    jobs["status"].add_argument("--json", action="store_true", help="print JSON")
    jobs["logs"].add_argument("--follow", action="store_true", help="until its end, with its exit code")
    text = "look at this machine, or at the cluster of RAY_ADDRESS: versions, GPUs, storage, clock, disk, memory"
    doctor = commands.add_parser("doctor", help=text, description=text)
    doctor.add_argument("run", nargs="?", help="run file whose storage and workers are looked at")
    doctor.add_argument("--storage", help="directory or s3:// prefix to measure; the run's if left out")
    doctor.add_argument(
        "--wait-for-nodes", action="store_true", help="ask the cluster for the run's machines, and wait"
    )
    doctor.add_argument("--links", action="store_true", help="measure an all-reduce between the nodes, too")
    doctor.add_argument("--json", action="store_true", help="a line of JSON for each check")
    doctor.set_defaults(verb=cluster.doctor, overrides=[])


def _from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; give 0 to 65535")
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
