"""Signals while the driver waits inside Ray: Ray prints and drops every exception of a signal handler but one."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from ftray.errors import Interrupted, Preempted

WAITS_IN_RAY = """
import ray, sys, time
from ftray.cli.context import _run_and_report
from ftray.console import Console

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0)
def answer(seconds):
    time.sleep(seconds)

def work():
    ray.get(answer.remote(0))
    print("waiting", flush=True)
    ray.get(answer.remote(120))
    return 0

def fail(text, before="", **fields):
    print(text, file=sys.stderr, flush=True)

sys.exit(_run_and_report(work, Console(), fail))
"""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, Preempted.exit_code, "preempted"), (signal.SIGINT, Interrupted.exit_code, "interrupted")],
)
def test_a_signal_ends_a_command_that_waits_inside_ray(number: int, code: int, word: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS_IN_RAY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        for line in command.stdout:
            if line == "waiting\n":
                break
        command.send_signal(number)
        _, errors = command.communicate(timeout=60)
    assert command.returncode == code, errors
    assert f"{word}; run the same command again to continue" in errors
