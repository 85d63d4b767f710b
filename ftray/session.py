"""Surroundings of one command: libraries' output in a log file, and a Ray, started here or joined.

Knows nothing of runs beyond a name and a number of CPUs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ftray import storage
from ftray.console import Console
from ftray.errors import ConfigError, FtrayError, RunError, innermost
from ftray.reach import answers, knock


@contextmanager
def quiet(name: str, console: Console) -> Iterator[None]:
    """What Ray, its processes and the libraries print goes to a log file, which the console names."""
    log = storage.cache_directory() / "logs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console.run = name
    console.say(f"what Ray and other libraries print goes to {log}")
    with console.quiet_natives(log):
        yield


@contextmanager
def signals_later() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block: a compiled module that is being imported may swallow what a handler
    raises, and the command would go on as if nobody had asked. Outside of the main thread it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    kept = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:  # one that Python did not install can't be put back
                signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


@contextmanager
def ray_session(num_cpus: float) -> Iterator[None]:
    """Ray for one command: the cluster of RAY_ADDRESS, or one of its own on this machine.

    num_cpus: what workers reserve; a Ray of its own has one more, so that data is never starved. Raises ConfigError
    when the cluster can't be reached, RunError when it goes away meanwhile.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS {address}: ftray runs on the cluster itself, not through Ray's client; use ray job submit, or give "
            "host:port of the head from one of the cluster's machines"
        )
    if address and address != "local":
        try:
            knock(address)
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as err:
            reason = " ".join(str(err).split())[:200]
            raise ConfigError(
                f"RAY_ADDRESS {address}: no Ray cluster answers ({reason}); correct or unset it"
            ) from None
    else:
        total = max(os.cpu_count() or 1, int(num_cpus)) + 1
        ray.init(address="local", num_cpus=total, include_dashboard=False, log_to_driver=False, logging_level="warning")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process with another code
    head = ray.get_runtime_context().gcs_address
    try:
        yield
    except Exception as err:
        if isinstance(innermost(err), FtrayError) or answers(head):
            raise
        # Whatever Ray made of it: a lost actor, a failed call, a time-out.
        raise RunError(f"the Ray cluster's head is gone ({head}); run the same command again to continue") from None
    finally:
        ray.shutdown()
