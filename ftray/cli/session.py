"""The session of one command: library output goes to a log file, and Ray is started or joined."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ftray import storage
from ftray.cli.child_process import report
from ftray.console import Console
from ftray.errors import ConfigError, FtrayError, RunError, innermost
from ftray.network import check_listening, is_listening
from ftray.signals import signal_handler, termination_signals

START_TRIES = 3
ESSENTIAL = ("gcs_server", "raylet")  # a driver can't continue without these Ray processes
_told: tuple[Console, str] | None = None  # the console of this command, and the log file of libraries


@contextmanager
def quiet(name: str, console: Console) -> Iterator[None]:
    """Redirects the output of Ray and other libraries to a log file, and prints its path."""
    log = storage.cache_directory() / "logs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    global _told
    console.run, _told = name, (console, str(log))
    console.say(f"output of Ray and other libraries: {log}")
    with console.quiet_natives(log):
        yield


@contextmanager
def signals_later() -> Iterator[None]:
    """Delays SIGINT, SIGTERM and SIGHUP to the end of the block.

    While a compiled module is imported, it may swallow the exception of a signal handler, and the command would continue.
    """
    caught: list[int] = []
    with signal_handler(lambda number, _: caught.append(number), (signal.SIGINT, *termination_signals())):
        yield
    if caught:
        signal.raise_signal(caught[0])


@contextmanager
def ray_session(num_cpus: float) -> Iterator[None]:
    """Ray for one command: the cluster of RAY_ADDRESS, or a local one.

    Args:
        num_cpus: CPUs that workers reserve. A local Ray gets one more for data processing.

    Raises:
        ConfigError: The cluster can't be reached.
        RunError: The cluster went away, or the local Ray did not start.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    handlers = {number: signal.getsignal(number) for number in termination_signals()}
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS {address}: ftray does not support Ray Client; use ftray submit, or host:port of "
            "the head from one of the cluster's machines"
        )
    if address and address != "local":
        try:
            check_listening(address)
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as err:
            reason = " ".join(str(err).split())[:200]
            raise ConfigError(
                f"RAY_ADDRESS {address}: no Ray cluster answers ({reason}); correct or unset it"
            ) from None
    else:
        total = max(os.cpu_count() or 1, int(num_cpus)) + 1
        _start_local(total)
        report(ray={p.name(): p.pid for p in psutil.Process().children() if p.name() in ESSENTIAL})
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray's handlers would end the process with another exit code
    head = ray.get_runtime_context().gcs_address
    try:
        yield
    except Exception as err:
        if isinstance(innermost(err), FtrayError) or is_listening(head):
            raise
        # Ray may report it as a lost actor, a failed call or a timeout.
        raise RunError(f"the Ray cluster's head is gone ({head}); run the same command again to continue") from None
    finally:
        report(ray={})  # a planned shutdown from here on
        ray.shutdown()


def _start_local(num_cpus: int) -> None:
    """Starts a local Ray. Retries, because the start may time out on a busy machine. Raises RunError."""
    import ray

    before = {process.pid for process in psutil.Process().children()}
    for attempt in range(1, START_TRIES + 1):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
            )
            return
        except Exception as err:  # noqa: BLE001 - Ray raises plain exceptions on timeouts
            reason = " ".join(str(err).split())[:200] or type(err).__name__
        _end_half_started(before)
        log = _told[1] if _told else ""
        if attempt == START_TRIES:
            where = f"; see {log} and {ray_logs()}" if log else f"; see {ray_logs()}"
            raise RunError(
                f"Ray did not start in {START_TRIES} tries ({reason}){where}. Make sure that the machine has free CPU, "
                "memory and disk, then run the same command again to continue"
            )
        if _told:
            _told[0].warn(f"Ray did not start ({reason}); trying again ({attempt + 1} of {START_TRIES})")


def ray_logs() -> str:
    """The log directory of the newest Ray on this machine."""
    return str(Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "session_latest", "logs"))


def _end_half_started(before: set[int]) -> None:
    """Ends processes of a failed Ray start: children of this process that are not in `before`."""
    import ray

    with suppress(Exception):
        ray.shutdown()
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=10)
