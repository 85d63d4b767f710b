"""Setup that commands share: their options, error handling, and the run that an argument names."""

from __future__ import annotations

import functools
import inspect
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftray import config
from ftray.cli.child_process import run_in_child
from ftray.config.aliases import alias_hint
from ftray.console import Console, escaped, json_line, outlive_terminal, printable
from ftray.errors import ConfigError, FtrayError, Interrupted, Preempted, innermost
from ftray.redact import redacted
from ftray.signals import interrupted_by_signals, is_termination, received_signals

if TYPE_CHECKING:
    from ftray.storage import Lease
    from ftray.train.checkpoint.catalog import CheckpointRef

RunTarget = Annotated[
    str, typer.Argument(metavar="RUN", help="Run file (.yaml) or directory of an existing run.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, for example train.max_steps=10.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Step = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Use the checkpoint of step N. Default: the best by eval loss, otherwise the newest."
    ),
]


def command(
    *, is_work: bool = False, starts_ray: bool | Callable[[dict[str, Any]], bool] = False, restarts: int = 0
) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Turns a function with a `console` parameter and an exit code into a typer command.

    Args:
        is_work: The command works on a run, so FTRAY_LOG=json applies. Commands that answer a question print text.
        starts_ray: Whether the command may start a local Ray, or a function of its options. It then runs in a child
            process, so that it outlives that Ray.
        restarts: How often the command is started again after its Ray died.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        parameters = [p for name, p in signature.parameters.items() if name != "console"]
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)

        @functools.wraps(function)
        def run_command(ctx: typer.Context, **options: Any) -> None:
            if "overrides" in options:
                options["overrides"] = _overrides(ctx, options["overrides"] or [])
            needs_ray = starts_ray(options) if callable(starts_ray) else starts_ray
            is_process = bool(ctx.find_root().obj)
            raise typer.Exit(_execute(function, options, is_work, restarts if needs_ray and is_process else None))

        run_command.__signature__ = signature.replace(parameters=[context, *parameters])  # type: ignore[attr-defined]
        run_command.__annotations__ = {p.name: p.annotation for p in [context, *parameters]}
        return run_command

    return decorate


def _overrides(ctx: typer.Context, words: list[str]) -> list[str]:
    """Returns the words with `--key=value` as `key=value`. Fails for an option that the command does not have."""
    options = [name for param in ctx.command.params for name in param.opts if name.startswith("-")]
    overrides = []
    for word in words:
        name, has_value, _ = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
            continue
        key = name.lstrip("-")
        is_key = key.split(".")[0] in config.RunConfig.model_fields
        if is_key and not has_value:
            ctx.fail(f"{name} is a setting; write {key}=VALUE or --{key}=VALUE")
        if not is_key and (matches := get_close_matches(name, [*options, "--help"])):
            ctx.fail(f"No such option: {name}. Did you mean {matches[0]}?")
        if not has_value or not word.startswith("--"):
            hint = alias_hint(key)
            ctx.fail(f"No such option: {name}" + (f"; {hint}" if hint else ""))
        overrides.append(word[2:])
    return overrides


def _execute(function: Callable[..., int], options: dict[str, Any], is_work: bool, restarts: int | None) -> int:
    """Runs a command and returns its exit code. restarts: None runs it in this process, a number in a child process."""
    log_format = os.environ.get("FTRAY_LOG", "text")
    if log_format not in ("json", "text"):
        print(f"ftray: FTRAY_LOG is {escaped(redacted(log_format))}; use json, text, or unset it", file=sys.stderr)
        return ConfigError.exit_code
    console = Console(as_json=log_format == "json" and is_work)

    def fail(text: str, before: str = "", **fields: Any) -> None:
        line = json_line("failed", text, "error", console.run, None, console.step, **fields)
        stream = outlive_terminal(sys.stderr)
        print(line if console.as_json else f"{before}ftray: {escaped(redacted(text))}", file=stream, flush=True)

    def work() -> int:
        return _run_and_report(lambda: function(**options, console=console), console, fail)

    has_own_ray = sys.platform == "linux" and os.environ.get("RAY_ADDRESS", "local") in ("", "local")
    if restarts is not None and has_own_ray:
        return run_in_child(work, console.warn, lambda text: fail(text, exit_code=1), restarts)
    return work()


def _run_and_report(work: Callable[[], int], console: Console, fail: Callable[..., None]) -> int:
    """Runs a command in this process. An error becomes one line and an exit code."""
    try:
        with interrupted_by_signals():
            return work()
    except Exception as err:  # noqa: BLE001 - a bug in ftray: its traceback is shown without secrets
        if isinstance(err, BrokenPipeError) and _output_is_closed():
            return 128 + signal.SIGPIPE
        cause = innermost(err)  # errors of Ray tasks arrive wrapped
        if isinstance(cause, FtrayError):
            fail(str(cause), exit_code=cause.exit_code)
            return cause.exit_code
        trace = "".join(traceback.format_exception(err))
        if console.as_json:
            fail(f"{type(cause).__name__}: {cause}", exit_code=1, traceback=trace)
        else:
            print(printable(redacted(trace)), file=sys.stderr, end="")
        return 1
    except KeyboardInterrupt:
        if any(map(is_termination, received_signals())):
            fail("preempted; run the same command again to continue", exit_code=Preempted.exit_code)
            return Preempted.exit_code
        start = "\n" if sys.stderr.isatty() else ""  # below the terminal's ^C
        fail("interrupted; run the same command again to continue", start, exit_code=Interrupted.exit_code)
        return Interrupted.exit_code


def _output_is_closed() -> bool:
    """Whether stdout is a closed pipe, for example after `| head`. If so, further output is discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(flags & select.POLLERR for _, flags in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def at_most_one(**options: object) -> None:
    """Raises ConfigError if more than one of these options is set."""
    names = [f"--{name.rstrip('_').replace('_', '-')}" for name, value in options.items() if value]
    if len(names) > 1:
        raise ConfigError(f"{names[0]} and {names[1]} cannot be combined; use one of them")


def open_target(target: str, overrides: list[str] | None = None) -> config.RunConfig:
    """Opens a run file, or the directory of a run (local or s3://) with its run.json."""
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
    for text in overrides or []:
        apply_override(tree, text)
    tree["storage"] = storage.absolute(target).rsplit("/", 1)[0]
    return config.parse_run(tree, uri)


@contextmanager
def owned(
    run: config.RunConfig, console: Console, with_ray: bool = True, parent: str | None = None
) -> Iterator[tuple[str, Lease]]:
    """Opens the run's directory for writing: checks the input, takes the lease, redirects library output, starts Ray."""
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
    ):  # the lease first, because run.json may be rewritten
        with signals_later():
            import ftray.driver.launch  # noqa: F401 - imports that take seconds, all at once
            from ftray.driver.preflight import preflight
            from ftray.evaluate.plan import check_inputs

        preflight(run)
        if with_ray:  # without Ray nothing is evaluated
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
    """Writes the run's report at the end, also after a failure, unless another process took over the run."""
    from ftray.report.run_report import try_report

    try:
        yield
    except (Preempted, KeyboardInterrupt):
        raise  # little time is left to release the lease
    except BaseException:
        if not lease.overtaken:
            try_report(run, run_dir, console)
        raise
    if not lease.overtaken:
        try_report(run, run_dir, console)


def finished(run: config.RunConfig, verify: bool = False) -> CheckpointRef | None:
    """The last checkpoint of a fully trained run, or None. Raises ConfigError if the directory belongs to another config."""
    from ftray.driver.run_record import finished_checkpoint

    return finished_checkpoint(run, verify)
