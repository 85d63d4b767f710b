"""What verbs have in common: the run that an argument names, and its directory while a verb works on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from ftray import config
from ftray.console import Console
from ftray.errors import ConfigError, Preempted

if TYPE_CHECKING:
    from ftray.storage import Lease
    from ftray.train.checkpoint.catalog import CheckpointRef


def open_target(target: str, overrides: list[str]) -> config.RunConfig:
    """The run that an argument names: a run file, or a run's directory (local or s3://) with its run.json."""
    if target.endswith((".yaml", ".yml")):
        return config.load_run(target, overrides)
    from ftray import storage
    from ftray.config.loader import apply_override

    uri = storage.join(storage.absolute(target), "run.json")
    if not storage.exists(uri):
        raise ConfigError(
            f"{target} is neither a run file (.yaml) nor the directory of a run (it has no run.json); correct the path"
        )
    remedy = "restore it, or give the run file instead"
    tree = storage.read_object(uri, remedy).get("config")
    if not isinstance(tree, dict):
        raise ConfigError(f"{uri} is damaged (it has no config); {remedy}")
    for text in overrides:
        apply_override(tree, text)
    tree["storage"] = storage.absolute(target).rsplit("/", 1)[0]
    return config.parse_run(tree, uri)


@contextmanager
def owned(
    run: config.RunConfig, console: Console, with_ray: bool = True, parent: str | None = None
) -> Iterator[tuple[str, Lease]]:
    """The run's directory: input checked, leased to this process, libraries quiet, Ray up if wanted."""
    from ftray import storage
    from ftray.cli.session import quiet, ray_session, signals_later
    from ftray.driver.run_record import check_identity, open_run
    from ftray.report.gpu_specs import check_accelerator

    run_dir = storage.absolute(run.directory)
    check_identity(run, run_dir)
    check_accelerator(run)
    with (
        storage.acquire_lease(run_dir, warn=console.warn) as lease,
        quiet(run.name, console),
    ):  # the lease first: run.json may be written anew
        with signals_later():
            import ftray.driver.launch  # noqa: F401 - what takes seconds to import, all at once
            from ftray.driver.preflight import preflight
            from ftray.evaluate.inputs import check_inputs

        preflight(run)
        if with_ray:  # else nothing is evaluated
            check_inputs(run)
        open_run(run, parent)
        with ray_session(run.scale.min_workers * run.scale.cpus_per_worker) if with_ray else nullcontext():
            yield run_dir, lease


def launch(run: config.RunConfig, run_dir: str, console: Console, lease: Lease) -> CheckpointRef:
    """Trains the run and exports its metrics to Ray."""
    from ftray.driver.launch import train
    from ftray.report.ray_metrics import TrainingMetrics

    return train(run, run_dir, console, lease, subscribers=[TrainingMetrics(run, warn=console.warn)])


@contextmanager
def reported(run: config.RunConfig, run_dir: str, console: Console, lease: Lease) -> Iterator[None]:
    """Writes the run's report at the end, also of a failure, while the run is this process's own."""
    from ftray.report.run_report import try_report

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


def finished(run: config.RunConfig, verify: bool = False) -> CheckpointRef | None:
    """The last checkpoint of a run that is trained to its end, else None. Raises ConfigError for another identity."""
    from ftray.driver.run_record import finished_checkpoint

    return finished_checkpoint(run, verify)
