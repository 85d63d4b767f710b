"""What each verb does. Each imports its room only when it is called, so that `ftray check` takes a second."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ftray import config
from ftray.console import Console
from ftray.errors import ConfigError, Preempted

if TYPE_CHECKING:
    from ftray.data.prepare import Data
    from ftray.evaluate.results import Comparison
    from ftray.observe.plan import Probed
    from ftray.storage import Lease
    from ftray.train.timeline import Found


def open_target(target: str, overrides: list[str]) -> config.Run:
    """The run that an argument names: a run file, or a run's directory (local or s3://) with its run.json."""
    if target.endswith((".yaml", ".yml")):
        return config.load_run(target, overrides)
    from ftray import storage
    from ftray.runfile import apply_override

    uri = storage.join(storage.absolute(target), "run.json")
    if not storage.exists(uri):
        raise ConfigError(
            f"{target} is neither a run file (.yaml) nor the directory of a run (it has no run.json); correct the path"
        )
    try:
        tree = json.loads(storage.read_bytes(uri))["config"]
    except (ValueError, KeyError):
        raise ConfigError(f"{uri} is damaged; restore it, or give the run file instead") from None
    for text in overrides:
        apply_override(tree, text)
    tree["storage"] = storage.absolute(target).rsplit("/", 1)[0]
    return config.parse_run(tree, uri)


def check(arguments: argparse.Namespace, console: Console) -> int:
    """Reads a run file and prints what follows from it."""
    from ftray import storage
    from ftray.train.trackers import check_trackers
    from ftray.train.zero import deepspeed_config

    run = open_target(arguments.run, arguments.overrides)
    deepspeed_config(run.train, run.deepspeed, run.micro_batch_size, run.world_sizes[0])
    is_here = (
        not storage.is_remote(run.storage) and "RAY_ADDRESS" not in os.environ
    )  # else this may be no machine of the run's
    if is_here:
        check_trackers(run)
    sweep = None
    if run.tune is not None:
        from ftray.tune.space import check_tune, describe

        sweep = describe(check_tune(run))
    _check_serving(run, is_here=is_here)
    if arguments.json:
        console.say(json.dumps(run.model_dump(mode="json"), indent=1))
        return 0
    data = run.data
    held_out = (
        "none"
        if data.eval is None
        else f"{data.eval.fraction:g} of the records"
        if isinstance(data.eval, config.Split)
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


def _check_serving(run: config.Run, *, is_here: bool) -> None:
    """Raises ConfigError for an endpoint that could not start. is_here: it would on this machine."""
    from ftray.serve.ready import check_holds, check_installed

    if run.method.type == "prompt":  # not served
        return
    made = [run]
    if run.tune is not None:
        from ftray.tune.space import corners, trial_run

        made = [trial_run(run, params, "trial", run.storage) for params in corners(run.tune)]
    for each in made:
        check_holds(each)
    if is_here:
        check_installed(run.serve)


def _check_trackers(run: config.Run) -> None:
    """Raises ConfigError for a tracker that could not be told from here, where the command runs."""
    from ftray.train.trackers import check_trackers

    check_trackers(run)


def _parts(run: config.Run) -> str:
    parts = f"{run.world_sizes[0]} workers × micro-batch {run.micro_batch_size} × {run.accumulation_steps} accumulated"
    return parts if len(run.world_sizes) == 1 else f"{parts} (or {', '.join(map(str, run.world_sizes[1:]))} workers)"


@contextmanager
def owned(
    run: config.Run, console: Console, with_ray: bool = True, parent: str | None = None
) -> Iterator[tuple[str, Lease]]:
    """The run's directory: input checked, leased to this process, libraries quiet, Ray up if wanted."""
    from ftray import storage
    from ftray.session import quiet, ray_session, signals_later
    from ftray.train.identity import check_identity, open_run

    run_dir = storage.absolute(run.directory)
    check_identity(run, run_dir)
    with (
        storage.acquire_lease(run_dir) as lease,
        quiet(run.name, console),
    ):  # the lease first: run.json may be written anew
        with signals_later():
            import ftray.train.launch  # noqa: F401 - what takes seconds to import, all at once
            from ftray.evaluate.inputs import check_inputs
            from ftray.train.preflight import preflight

        preflight(run)
        if with_ray:  # else nothing is evaluated
            check_inputs(run)
        open_run(run, parent)
        with ray_session(run.scale.min_workers * run.scale.cpus_per_worker) if with_ray else nullcontext():
            yield run_dir, lease


def train(arguments: argparse.Namespace, console: Console) -> int:
    """Trains, or continues."""
    run = open_target(arguments.run, arguments.overrides)
    if run.tune is not None:
        console.say("the section tune is for `ftray tune` and `ftray run`: this trains the file's own settings")
    if (done := _finished(run, verify=True)) is not None:
        console.say(f"training of '{run.name}' is complete ({done.step} steps): {done.uri}")
        return 0
    parent = None
    if arguments.parent is not None:
        from ftray.train.restore import open_parent

        parent = open_parent(arguments.parent).uri
    _check_trackers(run)
    with owned(run, console, parent=parent) as (run_dir, lease):
        with _reported(run, run_dir, console, lease):
            found = _launch(run, run_dir, console, lease)
        console.say(
            f"done: {found.step} steps, checkpoint {found.uri}\nreport: {run_dir}/report.html\n"
            f"next: ftray evaluate {arguments.run}"
        )
    return 0


def _launch(run: config.Run, run_dir: str, console: Console, lease: Lease) -> Found:
    """Training itself, with its figures told to Ray's metrics."""
    from ftray.observe.gauges import Gauges
    from ftray.train.launch import train as launch

    return launch(run, run_dir, console, lease, tell=Gauges(run, warn=console.warn).heard)


@contextmanager
def _reported(run: config.Run, run_dir: str, console: Console, lease: Lease) -> Iterator[None]:
    """Writes the run's report at the end, also of a failure, while the run is this process's own."""
    from ftray.observe.report import try_report

    try:
        yield
    except (Preempted, KeyboardInterrupt):
        raise  # little time is left: the lease is let go first
    except BaseException:
        if not lease.overtaken:
            try_report(run, run_dir, console)
        raise
    if not lease.overtaken:
        try_report(run, run_dir, console)


def plan(arguments: argparse.Namespace, console: Console) -> int:
    """Says what a run will need: memory, steps, time, cost."""
    from ftray import storage
    from ftray.observe.plan import as_text, as_tree, make_plan

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


def _probe(run: config.Run, console: Console) -> Probed:
    """Trains a few steps on the cluster, as a run that is deleted whatever comes of it."""
    from ftray import storage
    from ftray.observe.probe import STEPS, probe_of, probed
    from ftray.train.journal import read_events
    from ftray.train.timeline import read_metrics

    trial = probe_of(run)
    console.say(f"probe: {STEPS} steps of the run, as '{trial.name}', which is deleted afterwards")
    try:
        with owned(trial, console) as (run_dir, lease):
            _launch(trial, run_dir, console, lease)
            return probed(read_metrics(run_dir), read_events(run_dir))
    finally:
        storage.delete_tree(storage.absolute(trial.directory))


def report(arguments: argparse.Namespace, console: Console) -> int:
    """Writes all that is known of a run as one page."""
    from ftray import storage
    from ftray.observe.report import report_to

    run = open_target(arguments.run, arguments.overrides)
    report_to(run, storage.absolute(run.directory), console, arguments.html)
    return 0


def reproduce(arguments: argparse.Namespace, console: Console) -> int:
    """Trains a run once more under another name, from what it was trained from, and compares."""
    from ftray import storage
    from ftray.observe.reproduce import check_before, check_data, compare_runs, renamed, same_data

    old = open_target(arguments.run, arguments.overrides)
    old_dir = storage.absolute(old.directory)
    run = renamed(old, arguments.name)
    known = check_before(old, old_dir, arguments.other_environment, console)
    _check_trackers(run)
    with owned(run, console, parent=known.get("parent")) as (run_dir, lease):
        check_data(known, run, same_data(run, run_dir, console))
        with _reported(run, run_dir, console, lease):
            _launch(run, run_dir, console, lease)
    console.say(compare_runs(old_dir, run_dir))
    return 0


def tune(arguments: argparse.Namespace, console: Console) -> int:
    """Trains the run with different settings and names the best, or continues to."""
    _sweep(open_target(arguments.run, arguments.overrides), arguments.run, console)
    return 0


def _sweep(run: config.Run, target: str, console: Console) -> config.Run:
    """Runs the sweep of a run file; returns the winner's run."""
    from ftray.tune.space import check_tune

    trials = check_tune(run).max_concurrent or 1
    _check_trackers(run)
    with owned(run, console, with_ray=False) as (run_dir, lease):
        from ftray.observe.gauges import Gauges
        from ftray.session import ray_session
        from ftray.tune.sweep import preflight_trials, sweep, winning_run

        preflight_trials(run)
        with ray_session(trials * run.world_sizes[-1] * run.scale.cpus_per_worker):
            winner = sweep(
                run,
                run_dir,
                console,
                target,
                lease,
                lambda trial: Gauges(trial, warn=console.warn, name=f"{run.name}/{trial.name}").heard,
            )
            return winning_run(run, run_dir, winner)


def runs_gc(arguments: argparse.Namespace, console: Console) -> int:
    """Sweeps what no run needs any more."""
    from ftray.train.sweep import sweep_place

    sweep_place(arguments.place, arguments.older_than * 3600, arguments.dry_run, console)
    return 0


def runs_compare(arguments: argparse.Namespace, console: Console) -> int:
    """Shows two runs side by side."""
    from ftray import storage
    from ftray.observe.compare import compare_known
    from ftray.observe.report import read_known

    opened = [open_target(target, arguments.overrides) for target in (arguments.one, arguments.other)]
    for line in compare_known(*(read_known(run, storage.absolute(run.directory)) for run in opened)):
        console.say(line)
    return 0


def _finished(run: config.Run, verify: bool = False) -> Found | None:
    """The last checkpoint of a run that is trained to its end, else None. Raises ConfigError for another identity."""
    from ftray.train.identity import finished_checkpoint

    return finished_checkpoint(run, verify)


@contextmanager
def _data_of(run: config.Run, console: Console) -> Iterator[tuple[str, Data]]:
    """A run's directory and its data, indexed, with Ray up. Binds no name to settings and takes no lease."""
    from ftray import storage
    from ftray.session import quiet, ray_session, signals_later

    run_dir = storage.absolute(run.directory)
    storage.check_writable(run_dir)
    with quiet(run.name, console):
        with signals_later():
            import ftray.data.prepare  # noqa: F401 - as in `owned`
            from ftray.model.load import absolute_base, load_tokenizer, tokenizer_hash
            from ftray.train.preflight import preflight

        preflight(run)
        with ray_session(run.scale.min_workers):
            from ftray.data.prepare import prepare_data

            load = partial(load_tokenizer, absolute_base(run.model))
            yield run_dir, prepare_data(run, run_dir, console, load, tokenizer_hash(load()))


def data_index(arguments: argparse.Namespace, console: Console) -> int:
    """Reads, checks and counts all data."""
    run = open_target(arguments.run, arguments.overrides)
    with _data_of(run, console) as (_, data):
        from ftray.data.prepare import say_steps

        say_steps(data.plan, run.train, console)
    return 0


def data_stats(arguments: argparse.Namespace, console: Console) -> int:
    """Shows what the data is like."""
    run = open_target(arguments.run, arguments.overrides)
    with _data_of(run, console) as (run_dir, data):
        from ftray.data.stats import show_stats

        show_stats(data, run, run_dir, console, arguments.html)
    return 0


def data_preview(arguments: argparse.Namespace, console: Console) -> int:
    """Shows records as the model will see them."""
    from ftray.data.chunks import streams
    from ftray.data.preview import show_preview
    from ftray.model.load import load_tokenizer

    run = open_target(arguments.run, arguments.overrides)
    stream, _ = streams(run.data, partial(load_tokenizer, run.model))
    show_preview(stream, int(run.data.chunk_mb * 1e6), arguments.number, console)
    return 0


def data_order(arguments: argparse.Namespace, console: Console) -> int:
    """Shows the order of rows as the feed gives it. With --json only these lines go to standard output."""
    run = open_target(arguments.run, arguments.overrides)
    workers = arguments.workers or run.world_sizes[0]
    if run.train.global_batch_size % workers:
        raise ConfigError(
            f"--workers {workers} does not divide train.global_batch_size ({run.train.global_batch_size})"
        )
    first, end = arguments.steps
    start = first if arguments.after_step is None else arguments.after_step
    if not 0 <= start < end:
        raise ConfigError(f"--after-step {start} is not in front of the last step of --steps {first}:{end}; lower it")
    told = Console(sys.stderr) if arguments.json else console
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out, _data_of(run, told) as (_, data):
        from ftray.data.trace import as_line, as_text, trace_order

        if end > data.plan.num_steps:
            raise ConfigError(f"--steps {first}:{end}: the run has {data.plan.num_steps} steps; lower it")
        show = as_line if arguments.json else as_text
        for entry in trace_order(data.plan, workers, start, max(first, start), end):
            print(show(entry), file=out, flush=True)
    return 0


def evaluate(arguments: argparse.Namespace, console: Console) -> int:
    """Compares the tuned model with its base."""
    from ftray import storage
    from ftray.train.preflight import check_evaluation

    run = open_target(arguments.run, arguments.overrides)
    check_evaluation(run, storage.absolute(run.directory))
    with owned(run, console) as (run_dir, lease):
        from ftray.evaluate.compare import compare

        with _reported(run, run_dir, console, lease):
            comparison, _ = compare(run, run_dir, console)
    comparison.check_gates()
    return 0


def evaluate_human(arguments: argparse.Namespace, console: Console) -> int:
    """Has people compare the answers, blinded."""
    from ftray.evaluate.human.verb import Asked, human

    typed = Asked(arguments.csv, arguments.filled, arguments.results, arguments.host, arguments.port)
    human(open_target(arguments.run, arguments.overrides), typed, console)
    return 0


def evaluate_judge(arguments: argparse.Namespace, console: Console) -> int:
    """Has another model compare the answers."""
    from ftray.evaluate.judge import judge

    judge(open_target(arguments.run, arguments.overrides), console)
    return 0


def run(arguments: argparse.Namespace, console: Console) -> int:
    """The whole file, in order: tune, train, evaluate, export, one request to the endpoint."""
    run = open_target(arguments.run, arguments.overrides)
    from ftray.serve.trial import known_answer

    if run.tune is not None:
        from ftray.tune.space import check_tune

        check_tune(run)
        _check_serving(run, is_here="RAY_ADDRESS" not in os.environ)
        run = _sweep(run, arguments.run, console)
        arguments.run = run.directory  # the winner is a run like any other: what follows is done to it
    done = _finished(run)
    answer = known_answer(run.directory, done.step) if done is not None else None
    is_served = run.method.type != "prompt"  # its adapter is for PEFT
    comparison = _known_comparison(run) if done is not None and run.evaluate.gates else None
    if done is None or answer is None or (run.evaluate.gates and comparison is None):
        _check_serving(run, is_here="RAY_ADDRESS" not in os.environ)  # the endpoint comes last
        _check_trackers(run)
        with owned(run, console) as (run_dir, lease):
            from ftray.evaluate.compare import compare
            from ftray.observe.card import described
            from ftray.serve.trial import try_endpoint
            from ftray.train.export import export as write

            with _reported(run, run_dir, console, lease):
                done = _launch(run, run_dir, console, lease)
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


def _known_comparison(run: config.Run) -> Comparison | None:
    """What was found of the checkpoint that is exported, if it was compared by these settings."""
    from ftray import storage
    from ftray.evaluate.results import known_results
    from ftray.train.timeline import best_checkpoint

    run_dir = storage.absolute(run.directory)
    return known_results(run, run_dir, best_checkpoint(run_dir).step)


def _say_end(arguments: argparse.Namespace, run: config.Run, console: Console, is_refused: bool) -> None:
    from ftray import storage

    directory = storage.absolute(run.directory)
    for line in (
        "",
        f"the run '{run.name}' is complete. Everything is in {directory}:",
        "  report.html             all of it on one page",
        "  checkpoints/            committed checkpoints      metrics.jsonl          a line for each step",
        "  evaluate/results.json   base against tuned         evaluate/generations.jsonl  answers side by side",
        "  model/                  the trained model"
        + {"full": "", "prompt": " (virtual tokens, for PEFT)"}.get(
            run.method.type, " (adapter)      model/merged/          whole weights"
        ),
        "",
        *(
            [f"serve it:               ftray serve {arguments.run}"]
            if run.method.type != "prompt" and not is_refused
            else []
        ),
        "train on your own data: cp jobs/quickstart.yaml my.yaml, set name and data.train in it, then: ftray run my.yaml",
    ):
        console.say(line)


def k8s_render(arguments: argparse.Namespace, console: Console) -> int:
    """Writes, or prints, the Kubernetes manifests of a run file."""
    from ftray.cluster.render import PARTS, as_yaml, render, write

    run = open_target(arguments.run, arguments.overrides)
    parts = arguments.parts or PARTS[:3]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"--parts {unknown[0]} is not known; known are {', '.join(PARTS)}")
    manifests = render(run, arguments.machine, arguments.image, parts)
    if arguments.directory is None:
        console.say("---\n".join(as_yaml(tree) for tree in manifests.values()).rstrip("\n"))
        return 0
    for path in write(manifests, Path(arguments.directory)):
        console.say(str(path))
    return 0


def submit(arguments: argparse.Namespace, console: Console) -> int:
    """Runs a file as a job of a Ray cluster, and follows it; returns the exit code of what ran there."""
    from ftray.cluster.jobs import Jobs
    from ftray.cluster.places import check_storage
    from ftray.cluster.submit import Manner
    from ftray.cluster.submit import submit as start

    run = config.load_run(arguments.run, arguments.overrides)
    check_storage(run)
    jobs = Jobs(arguments.address)
    manner = Manner(arguments.what, not arguments.no_check, arguments.wait_for_nodes, not arguments.no_wait)
    return start(run, Path(arguments.run).stem, manner, jobs, console)


def job_status(arguments: argparse.Namespace, console: Console) -> int:
    """Shows jobs."""
    from ftray.cluster.jobs import Jobs
    from ftray.cluster.submit import status

    return status(Jobs(arguments.address), arguments.name, arguments.json, console)


def job_logs(arguments: argparse.Namespace, console: Console) -> int:
    """Shows what a job printed."""
    from ftray.cluster.jobs import Jobs
    from ftray.cluster.submit import logs

    return logs(Jobs(arguments.address), arguments.name, arguments.follow, console)


def job_stop(arguments: argparse.Namespace, console: Console) -> int:
    """Ends a job."""
    from ftray.cluster.jobs import Jobs
    from ftray.cluster.submit import stop

    return stop(Jobs(arguments.address), arguments.name, console)


def doctor(arguments: argparse.Namespace, console: Console) -> int:
    """Looks at this machine, or at the cluster of RAY_ADDRESS; 1 where something is bad."""
    from dataclasses import asdict

    from ftray.cluster.doctor import Finding, examine, examine_cluster, has_room, judge, lines_of, place_of, worst_of
    from ftray.session import ray_session

    run = open_target(arguments.run, arguments.overrides) if arguments.run else None
    place = place_of(run, arguments.storage)
    links: list[Finding] = []
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        nodes = [examine(place)]
    else:
        with ray_session(0):
            if run is not None and arguments.wait_for_nodes:
                from ftray.cluster.room import wait_for_nodes

                wait_for_nodes(run, partial(has_room, run))
            nodes = examine_cluster(place)
            if arguments.links:
                from ftray.cluster.links import measure_links

                links = [measure_links()]
    findings = judge(nodes, run) + links
    for line in [json.dumps(asdict(found)) for found in findings] if arguments.json else lines_of(findings):
        console.say(line)
    return 1 if worst_of(findings) else 0
