"""Commands that train and export: `run`, `train`, `tune`, `reproduce`, `export`."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from ftray import config
from ftray.cli.context import (
    Overrides,
    RunTarget,
    Step,
    at_most_one,
    command,
    finished,
    launch,
    open_target,
    owned,
    reported,
)
from ftray.cli.inspect import check_serving
from ftray.console import Console
from ftray.errors import ConfigError, RunError

if TYPE_CHECKING:
    from ftray.evaluate.results import Comparison


@command(is_work=True, starts_ray=True, restarts=1)
def train(
    target: RunTarget,
    overrides: Overrides = None,
    parent: Annotated[
        str | None,
        Option("--from", metavar="CHECKPOINT", help="Start a new run from the weights of a checkpoint."),
    ] = None,
    *,
    console: Console,
) -> int:
    """Train a run, or continue it."""
    from ftray.events.trackers import check_trackers

    run = open_target(target, overrides)
    if run.tune is not None:
        console.say(
            "`ftray train` ignores the `tune` section and uses the other settings in the file; to sweep, use `ftray tune` or "
            "`ftray run`"
        )
    if (done := finished(run, verify=True)) is not None:
        console.say(f"training of '{run.name}' is complete ({done.step} steps): {done.uri}")
        return 0
    parent_uri = None
    if parent is not None:
        from ftray.train.checkpoint.restore import open_parent

        parent_uri = open_parent(parent).uri
    check_trackers(run)
    with owned(run, console, parent=parent_uri) as (run_dir, lease):
        with reported(run, run_dir, console, lease):
            checkpoint = launch(run, run_dir, console, lease)
        console.say(
            f"done: {checkpoint.step} steps, checkpoint {checkpoint.uri}\nreport: {run_dir}/report.html\n"
            f"next: ftray evaluate {target}"
        )
    return 0


@command(is_work=True, starts_ray=True, restarts=1)
def tune(target: RunTarget, overrides: Overrides = None, *, console: Console) -> int:
    """Search hyperparameters: train trials of the run, compare them, name the best."""
    _sweep(open_target(target, overrides), target, console)
    return 0


def _sweep(run: config.RunConfig, target: str, console: Console) -> config.RunConfig:
    """Runs the sweep of a run file; returns the winner's run."""
    from ftray.events.trackers import check_trackers
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


@command(is_work=True, starts_ray=True, restarts=1)
def reproduce(
    target: RunTarget,
    overrides: Overrides = None,
    name: Annotated[str | None, Option(help="Name of the new run. Default: <run>-again.")] = None,
    other_environment: Annotated[
        bool, Option("--other-environment", help="Continue even if packages, Python or the CPU type differ.")
    ] = False,
    *,
    console: Console,
) -> int:
    """Train a run again under another name, if nothing changed, and compare both."""
    from ftray import storage
    from ftray.events.trackers import check_trackers
    from ftray.report.reproduce import check_before, check_data, compare_reproduction, renamed, same_data

    original = open_target(target, overrides)
    original_dir = storage.absolute(original.directory)
    run = renamed(original, name)
    lineage = check_before(original, original_dir, other_environment, console)
    check_trackers(run)
    with owned(run, console, parent=lineage.get("parent")) as (run_dir, lease):
        check_data(lineage, run, same_data(run, run_dir, console))
        with reported(run, run_dir, console, lease):
            launch(run, run_dir, console, lease)
    console.say(compare_reproduction(original_dir, run_dir))
    return 0


@command(is_work=True, starts_ray=True, restarts=1)
def run(target: RunTarget, overrides: Overrides = None, *, console: Console) -> int:
    """Run the whole file: tune, train, evaluate, export and try the endpoint."""
    from ftray.events.trackers import check_trackers
    from ftray.serve.smoke_test import known_answer

    run = open_target(target, overrides)
    is_local = "RAY_ADDRESS" not in os.environ
    if run.tune is not None:
        from ftray.tune.space import check_tune

        check_tune(run)
        check_serving(run, is_local=is_local)
        run = _sweep(run, target, console)
        target = run.directory  # the winner is a run of its own: all later steps use it
    done = finished(run)
    answer = known_answer(run.directory, done.step) if done is not None else None
    comparison = _known_comparison(run) if done is not None and run.evaluate.gates else None
    if done is None or answer is None or (run.evaluate.gates and comparison is None):
        check_serving(run, is_local=is_local)  # the endpoint starts last, but must not fail then
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
            if run.method.type != "prompt-tuning":
                try_endpoint(run, run_dir, model_dir, done.step, question, console)
    _say_end(target, run, console, is_refused=comparison is not None and bool(comparison.missed))
    if comparison is not None:
        comparison.check_gates()
    return 0


def _known_comparison(run: config.RunConfig) -> Comparison | None:
    """The evaluation of the checkpoint that is exported, if it was made with these settings."""
    from ftray import storage
    from ftray.evaluate.results import known_results
    from ftray.train.checkpoint.catalog import best_checkpoint

    run_dir = storage.absolute(run.directory)
    return known_results(run, run_dir, best_checkpoint(run_dir).step)


def _say_end(target: str, run: config.RunConfig, console: Console, is_refused: bool) -> None:
    from ftray import storage

    directory = storage.absolute(run.directory)
    is_example = any(source.path.startswith("embedded:") for source in run.data.train)
    is_served = run.method.type != "prompt-tuning" and not is_refused
    for line in (
        "",
        f"the run '{run.name}' is complete. Everything is in {directory}:",
        "  report.html             all results on one page",
        "  checkpoints/            committed checkpoints      metrics.jsonl          one line per step",
        "  evaluate/results.json   base and tuned model       evaluate/generations.jsonl  answers side by side",
        "  model/                  the trained model"
        + {"full": "", "prompt-tuning": " (virtual tokens, for PEFT)"}.get(
            run.method.type, " (adapter)      model/merged/          merged weights"
        ),
        "",
        *([f"serve it:               ftray serve {target}"] if is_served else []),
        *(["train on your own data: ftray init DATA.jsonl"] if is_example else []),
    ):
        console.say(line)


@command(is_work=True, starts_ray=True)
def export(
    target: RunTarget,
    overrides: Overrides = None,
    step: Step = None,
    quantize: Annotated[
        Literal["nf4", "int8", "fp8"] | None,
        Option(help="Also quantize the merged model, and measure the loss in quality."),
    ] = None,
    to: Annotated[
        Literal["gguf"] | None, Option(help="Also write the merged model as a GGUF file for llama.cpp.")
    ] = None,
    merged: Annotated[
        bool, Option("--merged", help="With --push: upload the merged model instead of its adapter.")
    ] = False,
    converter: Annotated[
        str | None, Option(metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, if it is not on PATH.")
    ] = None,
    push: Annotated[
        str | None, Option(metavar="hub:ORG/NAME", help="Upload the result to the Hugging Face hub.")
    ] = None,
    *,
    console: Console,
) -> int:
    """Write the adapter and the merged model; optionally quantized, as GGUF, or to the hub."""
    from ftray import storage
    from ftray.model.export import check_push

    at_most_one(quantize=quantize, to=to, merged=merged)
    if merged and not push:
        raise ConfigError("--merged selects what --push uploads; add --push hub:org/name, or remove --merged")
    if converter and to != "gguf":
        raise ConfigError("--converter is for --to gguf; add --to gguf, or remove --converter")
    run = open_target(target, overrides)
    converter_path = _check_export(run, step, quantize, to, merged, converter)
    repository = check_push(push) if push else None
    with owned(run, console, with_ray=quantize is not None) as (run_dir, _):
        from ftray.report.model_card import described
        from ftray.train.export import export as write

        describe = partial(described, run, run_dir)
        whole = output = write(run, run_dir, console, describe, step)
        pushed = whole if merged else storage.join(run_dir, "model")
        if quantize:
            from ftray.evaluate.quantized import export_quantized

            output = pushed = export_quantized(run, run_dir, quantize, console, describe, step)
        if converter_path is not None:
            output = pushed = _export_gguf(run, run_dir, whole, converter_path, console, step)
        if repository is not None:
            output = f"{output}\npushed: {_push(pushed, repository, run, console)}"
    is_served = run.method.type != "prompt-tuning" and not (quantize or to)
    further = f"\nnext: ftray serve {target}" if is_served else ""
    console.say(f"done: {output}{further}" + (" (an adapter for PEFT)" if run.method.type == "prompt-tuning" else ""))
    return 0


def _check_export(
    run: config.RunConfig,
    step: int | None,
    quantize: str | None,
    to: str | None,
    merged: bool,
    converter: str | None,
) -> Path | None:
    """Checks the options of `export` before anything is loaded; returns the converter for GGUF. Raises ConfigError."""
    from ftray import storage
    from ftray.model.export import find_converter
    from ftray.model.quantize import check_quantize
    from ftray.train.checkpoint.catalog import best_checkpoint

    best_checkpoint(storage.absolute(run.directory), step)
    path = find_converter(converter) if to == "gguf" else None
    if run.method.type == "prompt-tuning" and (quantize or to or merged):
        raise ConfigError(
            "method.type prompt-tuning trains virtual tokens, which can't be merged; export without --quantize, --to and --merged"
        )
    if quantize:
        check_quantize(quantize)
    return path


def _export_gguf(
    run: config.RunConfig, run_dir: str, whole: str, converter: Path, console: Console, step: int | None
) -> str:
    """Writes `<run>/gguf/<name>.gguf` and the model card, unless they exist for this checkpoint; returns the URI."""
    from ftray import storage
    from ftray.model.export import convert_to_gguf
    from ftray.report.model_card import CARD, LINEAGE
    from ftray.train.checkpoint.catalog import best_checkpoint
    from ftray.train.export import fetch_part

    checkpoint = best_checkpoint(run_dir, step)
    target = storage.join(run_dir, "gguf")
    manifest = None if storage.verify_directory(target) else storage.read_manifest(target)
    if manifest is not None and manifest["meta"].get("step") == checkpoint.step:
        console.say(f"step {checkpoint.step} is already exported as GGUF: {target}")
        return target
    console.say(f"gguf: {converter} converts step {checkpoint.step}")
    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        source, directory = fetch_part(whole, Path(scratch)), Path(scratch, "gguf")
        directory.mkdir()
        file = directory / f"{run.name}.gguf"
        num_tensors = convert_to_gguf(converter, source, file, run.train.precision)
        for name in (CARD, LINEAGE):
            if (source / name).exists():
                (directory / name).write_bytes((source / name).read_bytes())
        console.say(f"gguf: {num_tensors} tensors, {file.stat().st_size / 1e6:,.1f} MB, read back")
        storage.delete_tree(target)
        meta = {"step": checkpoint.step, "run": run.name, "base": run.model.base, **checkpoint.meta}
        if not storage.commit_directory(directory, target, meta):
            raise RunError(f"{target} was written by another process; run the command again")
    return target


def _push(uri: str, name: str, run: config.RunConfig, console: Console) -> str:
    """Uploads a directory with its card as README.md; returns the commit's URL."""
    from ftray.model.export import push_to_hub
    from ftray.report.model_card import CARD
    from ftray.train.export import fetch_part

    console.say(f"push: {uri} to {name}")
    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        directory = fetch_part(uri, Path(scratch), alone=True)
        if (directory / CARD).exists():
            (directory / CARD).rename(directory / "README.md")
        return push_to_hub(directory, name, f"{run.name}, fine-tuned with ftray")
