"""The process in front of a command: it passes signals on, keeps exit codes, and outlives the Ray that the command drives.

Ray is played by two `sleep`s that the command starts and reports.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
HEAD = """
import os, signal, subprocess, sys, time
from ftray.cli import child_process as command
say = lambda text: print(text, flush=True)

def start_ray():
    raylet, agent = (subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2))
    command.report(ray={"raylet": raylet.pid})
    say(f"ray {raylet.pid} {agent.pid}")

def main(work, restarts=1):
    sys.exit(command.run_in_child(work, lambda text: say(f"warning: {text}"), lambda text: say(f"ftray: {text}"), restarts))
"""


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", HEAD + code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def is_gone(pid: int) -> bool:
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_exit_code_and_the_output_are_those_of_the_command(code: int) -> None:
    with process(f"main(lambda: say('done') or {code})") as child:
        assert child.wait() == code
        assert line(child) == "done"


def test_a_raylet_that_dies_is_said_and_the_command_starts_once_more() -> None:
    with process("main(lambda: start_ray() or time.sleep(600) or 0)") as child:
        first = [int(word) for word in line(child).split()[1:]]
        os.kill(first[0], signal.SIGKILL)
        assert line(child).startswith(f"warning: Ray's raylet (pid {first[0]}) died; restarting Ray")
        assert is_gone(first[1]), "what the dead Ray left behind"
        second = [int(word) for word in line(child).split()[1:]]
        os.kill(second[0], signal.SIGKILL)
        said = line(child)
        assert said.startswith(f"ftray: Ray's raylet (pid {second[0]}) died, and the command ended with it; ")
        assert said.endswith("run the same command again to continue")
        assert child.wait() == 1
        assert is_gone(second[1])


def test_a_process_that_ray_ends_without_a_word_is_a_lost_ray() -> None:
    with process("main(lambda: start_ray() or os._exit(1), restarts=0)") as child:
        _, agent = (int(word) for word in line(child).split()[1:])
        assert line(child).startswith("ftray: Ray ended the process that drove it")
        assert child.wait() == 1
        assert is_gone(agent)


def test_a_ray_that_is_shut_down_on_purpose_is_not_lost() -> None:
    code = "def work():\n  start_ray()\n  command.report(ray={})\n  command.end_descendants()\n  time.sleep(2)\n  return 3\n"
    with process(code + "main(work)") as child:
        assert child.wait() == 3


def test_a_process_that_is_killed_ends_the_command_by_the_same_signal_and_nothing_stays() -> None:
    with process("main(lambda: start_ray() or os.kill(os.getpid(), signal.SIGKILL))") as child:
        pids = [int(word) for word in line(child).split()[1:]]
        assert line(child).startswith("ftray: the command was killed by SIGKILL")
        assert child.wait() == -signal.SIGKILL
        assert all(map(is_gone, pids))


WAITS = """
def work():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: say(f"got {n}"))
    say(f"up {os.getpid()} {os.getsid(0)} {os.environ['FTRAY_COMMAND_PID']}")
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        time.sleep(0.05)
main(work)
"""


def test_signals_reach_the_command_once_and_it_has_a_session_of_its_own() -> None:
    with process(WAITS) as child:
        _, pid, session, shown = line(child).split()
        assert pid == session != str(child.pid) == shown
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child.send_signal(number)
            assert line(child) == f"got {int(number)}"
        child.kill()
        assert is_gone(int(pid)), "the command's process ends with the one that the user sees"


def test_ctrl_z_stops_all_and_fg_lets_them_go_on() -> None:
    with process(WAITS) as child:
        pid = int(line(child).split()[1])
        child.send_signal(signal.SIGTSTP)
        end_s = time.monotonic() + 10
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        assert psutil.Process(child.pid).status() == psutil.STATUS_STOPPED
        child.send_signal(signal.SIGCONT)
        child.send_signal(signal.SIGTERM)
        assert line(child) == "got 15"
