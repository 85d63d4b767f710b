"""Runs a case in a process of its own under limits, and judges what it did.

Processes are forked from a server that has the libraries loaded (multiprocessing's forkserver), which saves the seconds
that importing torch takes. Memory is the sum of the proportional set sizes of the process and all its descendants: pages
that forks share are counted once.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.hostile.case import Case, Place

MEMORY_BYTES = 2 << 30
DEADLINE_S = 20.0  # of processor time, which a busy machine doesn't lengthen
WALL_FACTOR = 6  # a process that only waits ends after so many times the deadline
POLL_S = 0.05
MARK = "FTRAY_HOSTILE_CASE"
PRELOAD = ["bench.hostile.preload"]
ANSWER = re.compile(r"^ftray: \S.*$")
SECRET = "outside-secret-7919"


@dataclass
class Outcome:
    """What a case did. faults: broken promises, in words; none: it passed."""

    name: str
    code: int | None
    seconds: float
    peak_bytes: int
    output: str
    faults: list[str] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The sentence for the user."""
        lines = [line for line in self.output.splitlines() if line.startswith("ftray: ")]
        return lines[-1] if lines else ""


def run_case(case: Case, memory_bytes: int = MEMORY_BYTES, deadline_s: float = DEADLINE_S) -> Outcome:
    """Runs a case in an empty directory, which is removed afterwards; returns what it did."""
    with _place() as (place, root):
        case.prepare(place)
        before = _snapshot(root, place)
        outcome = _run(case, place, root, memory_bytes, deadline_s)
        _judge(outcome, case, place)
        after = _snapshot(root, place)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            outcome.faults.append(f"it wrote outside the run directory: {', '.join(changed[:3])}")
        return outcome


@contextmanager
def _place() -> Iterator[tuple[Place, Path]]:
    root = Path(tempfile.mkdtemp(prefix="ftray-hostile-"))
    try:
        for name in ("run", "outside", "home", "tmp"):
            (root / name).mkdir()
        (root / "outside" / "secret.txt").write_text(SECRET)
        yield Place(root / "run", root / "outside"), root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _snapshot(root: Path, place: Place) -> dict[str, str]:
    """Contents of all files that the case may not touch: all but the run directory, the cache and temporary files."""
    own = (place.directory, root / "home", root / "tmp", root / "out", place.canary)
    files = [p for p in root.rglob("*") if not any(p == o or o in p.parents for o in own)]
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "directory"
        for p in files
    }


def _run(case: Case, place: Place, root: Path, memory_bytes: int, deadline_s: float) -> Outcome:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    output = root / "out"
    mark = f"{os.getpid()}-{root.name}"
    arguments = (case.command, str(place.directory), str(root), str(output), mark)
    process = context.Process(target=_child, args=arguments)
    began = time.monotonic()
    process.start()
    assert process.pid is not None
    family, peak, faults = {process.pid}, 0, []
    while process.is_alive():
        used, cpu_s = _usage(process.pid, family)
        peak = max(peak, used)
        if used > memory_bytes:
            faults.append(f"it took more than {memory_bytes >> 20} MiB")
        elif max(cpu_s, (time.monotonic() - began) / WALL_FACTOR) > deadline_s:
            faults.append(f"it ran for more than {deadline_s:g} s")
        if faults:
            break
        process.join(POLL_S)
    seconds = time.monotonic() - began
    _end(family, mark)
    process.join(10)
    text = output.read_text(errors="replace") if output.exists() else ""
    return Outcome(case.full_name, None if faults else process.exitcode, seconds, peak, text, faults)


def _usage(pid: int, family: set[int]) -> tuple[int, float]:
    """Proportional set size in bytes and processor time in seconds of a process and its descendants.

    They are added to `family`.
    """
    try:
        root = psutil.Process(pid)
        members = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0, 0.0
    total, cpu_s = 0, 0.0
    for member in members:
        family.add(member.pid)
        with suppress(psutil.Error, OSError, AttributeError):
            times = member.cpu_times()
            cpu_s += times.user + times.system
            if member is root:
                cpu_s += times.children_user + times.children_system
            total += member.memory_full_info().pss
    return total, cpu_s


def _end(family: set[int], mark: str) -> None:
    """Ends what still lives of a case; processes that left the tree are known by the mark in their environment."""
    for process in psutil.process_iter(["pid"]):
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark or (process.pid in family and process.pid != os.getpid()):
                process.send_signal(signal.SIGKILL)


def _judge(outcome: Outcome, case: Case, place: Place) -> None:
    if place.canary.exists():
        outcome.faults.append("it ran code of the input")
    if "Traceback (most recent call last)" in outcome.output:
        outcome.faults.append("it printed a traceback")
    if SECRET in outcome.output:
        outcome.faults.append("it printed a file outside the run directory")
    if outcome.code is None:
        return
    allowed = (0, 2) if case.harmless else (2,)
    if outcome.code not in allowed:
        outcome.faults.append(f"its exit code is {outcome.code}")
    if outcome.code == 2:
        answers = [line for line in outcome.output.splitlines() if ANSWER.match(line)]
        if len(answers) != 1:
            outcome.faults.append(f"it gave {len(answers)} sentences")


def _child(command: object, directory: str, root: str, output: str, mark: str) -> None:
    """The process of a case: a command of the command line, or a function, with its output in a file."""
    os.setsid()
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.chdir(directory)
    for name in ("RAY_ADDRESS", "FTRAY_API_KEY", "HF_TOKEN"):
        os.environ.pop(name, None)
    home, tmp = os.path.join(root, "home"), os.path.join(root, "tmp")  # noqa: PTH118
    os.environ.update(
        {
            MARK: mark,
            "HOME": home,
            "TMPDIR": tmp,
            "FTRAY_CACHE": f"{home}/cache",
            "RAY_TMPDIR": tmp,
            "HF_HUB_OFFLINE": "1",
        }
    )
    tempfile.tempdir = tmp
    from ftray.cli import main
    from ftray.errors import FtrayError

    code = 0
    if callable(command):
        try:
            command()
        except FtrayError as err:
            print(f"ftray: {err}", file=sys.stderr)
            code = err.exit_code
    else:
        assert isinstance(command, tuple)
        try:
            code = main.main(list(command))
        except SystemExit as err:
            code = err.code if isinstance(err.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
