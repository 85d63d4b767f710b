"""Runs a command that starts a local Ray in a child process, so that the command outlives that Ray.

Ray's C++ code silently ends its driver process a minute after the GCS is lost, and seconds after the raylet is lost. A small
parent process forwards signals, watches both Ray processes, and reports their death or restarts the command. The child has
its own session, so Ctrl-C and a closed terminal reach Ray's processes only through the child. Processes that a dead child
leaves behind become children of the parent (Linux' "subreaper"), which ends exactly these.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftray.signals import termination_signals

PID = "FTRAY_COMMAND_PID"  # in the child's environment: the pid of the parent, which users see and signal
LOOK_S = 0.3
SETTLE_S = 1.0  # a planned shutdown of Ray is reported within this time
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_report_fd = -1  # in the child: the pipe to its parent


@dataclass
class ChildResult:
    """How a child ended.

    Attributes:
        code: Exit code, as in a shell.
        signal: The signal that killed it, or 0.
        finished: It ended by itself.
        lost: The Ray process that died, in words, or "".
    """

    code: int
    signal: int = 0
    finished: bool = False
    lost: str = ""


def report(**what: Any) -> None:
    """Sends facts to the parent, if any: `ray`, pids of essential Ray processes by name; `end`, the exit code."""
    if _report_fd >= 0:
        with suppress(OSError):
            os.write(_report_fd, json.dumps(what).encode() + b"\n")


def run_in_child(
    work: Callable[[], int], warn: Callable[[str], None], fail: Callable[[str], None], restarts: int
) -> int:
    """Runs `work` in a child process, again when its Ray died, `restarts` times at most; returns the exit code.

    warn, fail: what the user is told, a warning and the last sentence. Call it from the main thread, before any other
    thread runs. In the child it does not return: the process exits with what `work` returned.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    again = "run the same command again to continue"
    while True:
        ended = _Child(work).wait()
        if ended.finished:
            return ended.code
        end_descendants()
        if ended.lost:
            if restarts > 0:
                restarts -= 1
                warn(f"{ended.lost}; restarting Ray, and continuing from the last commit")
                continue
            fail(f"{ended.lost}, and the command ended with it; {again}")
            return 1
        if ended.signal:
            name = signal.Signals(ended.signal).name
            why = " (possibly by the kernel, out of memory)" if ended.signal == signal.SIGKILL else ""
            fail(f"the command was killed by {name}{why}; {again}")
            _die_of(ended.signal)
        fail(f"the command exited without an error message (exit code {ended.code}); {again}")
        return ended.code or 1


@dataclass
class _Child:
    """One run of the command."""

    work: Callable[[], int]
    pid: int = 0
    ended: ChildResult | None = None
    essential: dict[str, int] = field(default_factory=dict)
    code: int | None = None
    _unread: bytes = b""

    def __post_init__(self) -> None:
        reader, writer = os.pipe()
        wanted = {signal.SIGINT, *termination_signals(), signal.SIGTSTP, signal.SIGCONT}
        numbers = {number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN}
        before = {number: signal.getsignal(number) for number in numbers}
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # the child must not take one for its parent
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            _be_child(self.work, parent, writer)
        os.close(writer)
        self._reader, self._before = reader, before
        for number in numbers:
            signal.signal(number, self._pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def wait(self) -> ChildResult:
        """Watches the child to its end."""
        try:
            missing_s = 0.0
            while self.ended is None:
                self._read_reports(LOOK_S)
                self._reap()
                if self.ended is not None:
                    break
                dead = [name for name, pid in self.essential.items() if not is_alive(pid)]
                missing_s = (missing_s or time.monotonic()) if dead else 0.0
                if missing_s and time.monotonic() - missing_s > SETTLE_S:
                    return ChildResult(1, lost=f"Ray's {dead[0]} (pid {self.essential[dead[0]]}) died")
            self._read_reports(0.0)
            return self._judged(self.ended)
        finally:
            os.close(self._reader)
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _judged(self, ended: ChildResult) -> ChildResult:
        if self.code is not None:  # whatever happened while the interpreter shut down
            ended.finished, ended.code = True, self.code
        if not ended.finished and self.essential and ended.signal in (0, signal.SIGABRT):
            ended.lost = "Ray ended the process that drove it, after it lost its GCS or raylet"
        return ended

    def _read_reports(self, within_s: float) -> None:
        """Reads what the child reports."""
        while self._reader >= 0 and select.select([self._reader], [], [], within_s)[0]:
            within_s = 0.0
            if not (data := os.read(self._reader, 1 << 16)):
                if self.ended is None:
                    time.sleep(LOOK_S)  # the child is about to exit
                return
            *lines, self._unread = (self._unread + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                self.essential = message.get("ray", self.essential)
                self.code = message.get("end", self.code)

    def _reap(self) -> None:
        """Reaps ended children: the command and its orphans."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.pid:
                    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                    self.ended = ChildResult(128 + killed_by if killed_by else os.WEXITSTATUS(status), killed_by)

    def _pass_on(self, number: int, _: Any) -> None:
        if number in (signal.SIGTSTP, signal.SIGCONT):  # Ctrl-Z and fg: Ray's processes wait, too
            all_of_them = descendants()
            for pid in all_of_them:
                _kill(pid, signal.SIGSTOP if number == signal.SIGTSTP else signal.SIGCONT)
            if number == signal.SIGTSTP:
                os.kill(os.getpid(), signal.SIGSTOP)
            return
        _kill(self.pid, number)


def _be_child(work: Callable[[], int], parent: int, writer: int) -> None:
    """The child's whole life."""
    global _report_fd
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died meanwhile
        os._exit(128 + signal.SIGKILL)
    os.setsid()
    os.environ[PID], _report_fd = str(parent), writer
    code = work()
    with suppress(OSError):
        sys.stdout.flush()
    report(end=code)
    sys.exit(code)


def descendants() -> list[int]:
    """Process ids of all descendants."""
    parents: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    pids, heads = list[int](), [os.getpid()]
    while heads:
        below = parents.get(heads.pop(), [])
        pids += below
        heads += below
    return pids


def end_descendants(within_s: float = 10.0) -> None:
    """Kills all descendants, and returns when they are gone."""
    end_s = time.monotonic() + within_s
    while (left := descendants()) and time.monotonic() < end_s:
        for pid in left:
            _kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; zombies do not."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def _stat(pid: int) -> list[str]:
    """State, parent and other fields of a process; [] if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _die_of(number: int) -> None:
    """Ends this process by the same signal as its child, for the shell to see."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), number)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
