"""Commands that look at data: `data index`, `data stats`, `data preview`, `data order`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

from ftray import config
from ftray.cli.context import Overrides, RunTarget, command, open_target
from ftray.console import Console, printable
from ftray.errors import ConfigError

if TYPE_CHECKING:
    from ftray.data.prepare import PreparedData


@contextmanager
def _data_of(run: config.RunConfig, console: Console) -> Iterator[tuple[str, PreparedData]]:
    """A run's directory and its data, indexed, with Ray up. Binds no name to settings and takes no lease."""
    from ftray import storage
    from ftray.cli.session import quiet, ray_session, signals_later

    run_dir = storage.absolute(run.directory)
    storage.check_writable(run_dir)
    with quiet(run.name, console):
        with signals_later():
            import ftray.data.prepare  # noqa: F401 - as in `owned`
            from ftray.driver.preflight import preflight
            from ftray.model.load import absolute_base, load_tokenizer, tokenizer_hash

        preflight(run)
        with ray_session(run.scale.min_workers):
            from ftray.data.prepare import prepare_data

            load = partial(load_tokenizer, absolute_base(run.model))
            yield run_dir, prepare_data(run, run_dir, console, load, tokenizer_hash(load()))


@command(starts_ray=True)
def index(target: RunTarget, overrides: Overrides = None, *, console: Console) -> int:
    """Read, check and count all data; print the steps of an epoch."""
    run = open_target(target, overrides)
    with _data_of(run, console) as (_, data):
        from ftray.data.prepare import say_steps

        say_steps(data.plan, run.train, console)
    return 0


@command(starts_ray=True)
def stats(
    target: RunTarget,
    overrides: Overrides = None,
    html: Annotated[str | None, Option(metavar="FILE", help="Also write a page with plots.")] = None,
    *,
    console: Console,
) -> int:
    """Show lengths, tokens, duplicates, packing and warnings."""
    run = open_target(target, overrides)
    with _data_of(run, console) as (run_dir, data):
        from ftray.data.stats import show_stats

        statistics = show_stats(data, run, run_dir, console)
        if html is not None:
            from ftray import storage
            from ftray.report.data_page import render_page

            storage.write_bytes(html, render_page(statistics, run.name).encode())
            console.say(f"as a page: {html}")
    return 0


@command()
def preview(
    target: RunTarget,
    overrides: Overrides = None,
    number: Annotated[int, Option(min=1, help="Records per source.")] = 3,
    *,
    console: Console,
) -> int:
    """Show records as the model will see them. Starts no Ray. Ends with 1 if one of them is bad."""
    from ftray.data.chunks import streams
    from ftray.data.preview import show_preview
    from ftray.model.load import load_tokenizer

    run = open_target(target, overrides)
    stream, _ = streams(run.data, partial(load_tokenizer, run.model), run.evaluate.slices)
    num_bad = show_preview(stream, int(run.data.chunk_mb * 1e6), number, console)
    return 1 if num_bad else 0


def _step_range(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise BadParameter(f"{text} is not a range of steps; write A:B with A below B, for example 0:10")
    return int(first), int(end)


@command(starts_ray=True)
def order(
    target: RunTarget,
    overrides: Overrides = None,
    workers: Annotated[int | None, Option(min=1, help="Number of ranks. Default: scale.num_workers.")] = None,
    steps: Annotated[str, Option(metavar="A:B", help="Steps A to B - 1.")] = "0:1",
    after_step: Annotated[
        int | None, Option(metavar="N", help="Start as if resuming from a checkpoint of step N.")
    ] = None,
    json: Annotated[bool, Option("--json", help="Print one line of JSON per step and rank.")] = False,
    *,
    console: Console,
) -> int:
    """Show which rank trains on which packed sequences and records at which step."""
    first, end = _step_range(steps)
    run = open_target(target, overrides)
    world_size = workers or run.world_sizes[0]
    if run.train.global_batch_size % world_size:
        raise ConfigError(
            f"--workers {world_size} does not divide train.global_batch_size ({run.train.global_batch_size})"
        )
    start = first if after_step is None else after_step
    if not 0 <= start < end:
        raise ConfigError(f"--after-step {start} is not below the last step of --steps {first}:{end}; lower it")
    messages = Console(sys.stderr) if json else console  # only the lines of JSON go to stdout
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out, _data_of(run, messages) as (_, data):
        from ftray.data.verify import as_line, as_text, trace_order

        if end > data.plan.num_steps:
            last = data.plan.num_steps
            raise ConfigError(
                f"--steps {first}:{end} goes past the run's last step (it has {last}); use {min(first, last - 1)}:{last}"
            )
        show = as_line if json else as_text
        for entry in trace_order(data.plan, world_size, start, max(first, start), end):
            print(show(entry) if json else printable(show(entry)), file=out, flush=True)
    return 0
