"""The views of `data`: `index`, `stats`, `preview`, `order`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ftray import config
from ftray.cli.context import open_target
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


def index(arguments: argparse.Namespace, console: Console) -> int:
    """Reads, checks and counts all data."""
    run = open_target(arguments.run, arguments.overrides)
    with _data_of(run, console) as (_, data):
        from ftray.data.prepare import say_steps

        say_steps(data.plan, run.train, console)
    return 0


def stats(arguments: argparse.Namespace, console: Console) -> int:
    """Shows what the data is like."""
    run = open_target(arguments.run, arguments.overrides)
    with _data_of(run, console) as (run_dir, data):
        from ftray.data.stats import show_stats

        statistics = show_stats(data, run, run_dir, console)
        if arguments.html is not None:
            from ftray import storage
            from ftray.report.data_page import render_page

            storage.write_bytes(str(arguments.html), render_page(statistics, run.name).encode())
            console.say(f"as a page: {arguments.html}")
    return 0


def preview(arguments: argparse.Namespace, console: Console) -> int:
    """Shows records as the model will see them."""
    from ftray.data.chunks import streams
    from ftray.data.preview import show_preview
    from ftray.model.load import load_tokenizer

    run = open_target(arguments.run, arguments.overrides)
    stream, _ = streams(run.data, partial(load_tokenizer, run.model))
    show_preview(stream, int(run.data.chunk_mb * 1e6), arguments.number, console)
    return 0


def order(arguments: argparse.Namespace, console: Console) -> int:
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
        from ftray.data.order_trace import as_line, as_text, trace_order

        if end > data.plan.num_steps:
            raise ConfigError(f"--steps {first}:{end}: the run has {data.plan.num_steps} steps; lower it")
        show = as_line if arguments.json else as_text
        for entry in trace_order(data.plan, workers, start, max(first, start), end):
            print(show(entry) if arguments.json else printable(show(entry)), file=out, flush=True)
    return 0
