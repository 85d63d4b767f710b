"""A Ray session for one command: an address from the environment, or a Ray of its own on this machine. Quiet.

Knows Ray's start and stop; nothing of runs beyond the number of CPUs they need.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ftray import storage
from ftray.console import Console


@contextmanager
def ray_session(name: str, num_cpus: float, console: Console) -> Iterator[None]:
    """Ray, started or joined (RAY_ADDRESS), its output in a log file that the console names.

    num_cpus: CPUs that training workers reserve; a Ray started here has one more, so that data is never starved.
    """
    log = storage.cache_directory() / "logs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    with console.quiet_natives(log):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        console.say(f"starting Ray; what it and the libraries print goes to {log}")
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        else:
            total = max(os.cpu_count() or 1, int(num_cpus)) + 1
            ray.init(
                address="local", num_cpus=total, include_dashboard=False, log_to_driver=False, logging_level="warning"
            )
        try:
            yield
        finally:
            ray.shutdown()
