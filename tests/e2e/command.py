"""`ftray` as a user types it: a process of its own in a directory of its own, without or with a terminal.

All processes of a place carry a mark in their environment, or are children of its fork server, so that the tests find
what a command leaves behind.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.fork_server import ForkServer

MARK = "FTRAY_TEST_PLACE"
DEADLINE_S = 420.0
SETTINGS = {
    "name": "tiny",
    "storage": "runs",
    "model": {"base": "model"},
    "method": {"type": "lora", "rank": 4, "alpha": 8},
    "data": {"max_seq_len": 128, "chunk_mb": 0.002, "train": [{"path": "data"}]},
    "train": {"max_steps": 6, "global_batch_size": 4, "learning_rate": 5e-3, "precision": "fp32"},
    "scale": {"num_workers": 2},
    "checkpoint": {"every": 3},
    "evaluate": {"num_generations": 4, "max_new_tokens": 12, "num_shown": 2},
}


@dataclass(frozen=True)
class Ended:
    """How a command ended. On a terminal both streams are `out`."""

    code: int
    out: str
    err: str
    seconds: float

    def line(self, beginning: str) -> str:
        """The one line of `out` that begins so."""
        found = [line for line in self.out.splitlines() if line.startswith(beginning)]
        assert len(found) == 1, f"{len(found)} lines begin with {beginning!r}:\n{self.out}{self.err}"
        return found[0]


class Command:
    """A running `ftray`."""

    def __init__(self, arguments: tuple[str, ...], directory: Path, env: dict[str, str], terminal: bool) -> None:
        script = str(Path(sys.executable).with_name("ftray"))
        self.name, self._began_s, self._texts = f"ftray {' '.join(arguments)}", time.monotonic(), {1: "", 2: ""}
        self.keyboard = -1
        if terminal:
            self.keyboard, slave = pty.openpty()
            streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        else:
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            [script, *arguments],
            cwd=directory,
            env=env,
            start_new_session=True,
            preexec_fn=_take_terminal if terminal else None,  # noqa: PLW1509 - two system calls
            **streams,
        )
        if terminal:
            os.close(slave)
            sources = {1: self.keyboard}
        else:
            assert self.process.stdout is not None
            assert self.process.stderr is not None
            sources = {1: self.process.stdout.fileno(), 2: self.process.stderr.fileno()}
        self._readers = [threading.Thread(target=self._read, args=s, daemon=True) for s in sources.items()]
        for reader in self._readers:
            reader.start()

    @property
    def text(self) -> str:
        """All that was printed so far."""
        return self._texts[1] + self._texts[2]

    def _read(self, number: int, fd: int) -> None:
        kept = b""
        while True:
            try:
                piece = os.read(fd, 1 << 16)
            except OSError:  # a terminal whose other end is closed
                return
            if not piece:
                return
            kept += piece
            self._texts[number] = kept.decode(errors="replace").replace("\r\n", "\n")

    def wait_for(self, text: str) -> None:
        """Waits until it has printed `text`."""
        while text not in self.text:
            assert self.process.poll() is None, f"{self.name} ended before it said {text!r}:\n{self.text}"
            self._check_time(f"for {text!r}")
            time.sleep(0.05)

    def press_ctrl_c(self) -> None:
        """The key itself: the terminal interrupts every process in the foreground."""
        os.write(self.keyboard, b"\x03")

    def wait(self) -> Ended:
        """Waits for its end. Fails if it printed a traceback."""
        while self.process.poll() is None:
            self._check_time("to end")
            time.sleep(0.05)
        seconds = time.monotonic() - self._began_s
        for reader in self._readers:
            reader.join(5)
        assert "Traceback" not in self.text, f"{self.name} printed a traceback:\n{self.text}"
        return Ended(self.process.returncode, self._texts[1], self._texts[2], seconds)

    def _check_time(self, what: str) -> None:
        if time.monotonic() - self._began_s > DEADLINE_S:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"{self.name}: waited {DEADLINE_S:.0f} s {what}:\n{self.text}")


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that were started in the background ignore it


class Place:
    """A directory to type commands in, with a home, a cache and an environment of its own."""

    def __init__(self, directory: Path, worker_server: ForkServer | None = None) -> None:
        self._worker_server = worker_server
        self.directory, self.cache, self.home = directory / "work", directory / "cache", directory / "home"
        self._mark = uuid.uuid4().hex
        for each in (self.directory, self.home):
            each.mkdir(parents=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FTRAY_", "RAY_", "HF_", "XDG_"))}
        fixed = {"FTRAY_CACHE": str(self.cache), "HOME": str(self.home), "HF_HUB_OFFLINE": "1", MARK: self._mark}
        self.env = {**kept, **fixed, **(worker_server.environment if worker_server else {})}

    def write(self, name: str = "run.yaml", **overrides: object) -> str:
        """Writes a run file: SETTINGS with overrides, dotted keys with __ for the dot; returns its name."""
        tree = yaml.safe_load(yaml.safe_dump(SETTINGS))
        for key, value in overrides.items():
            *path, last = key.split("__")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        (self.directory / name).write_text(yaml.safe_dump(tree, sort_keys=False))
        return name

    def start(self, *arguments: str, terminal: bool = False) -> Command:
        """Starts `ftray` with these arguments."""
        return Command(arguments, self.directory, self.env, terminal)

    def ftray(self, *arguments: str) -> Ended:
        """Runs `ftray` with these arguments to its end."""
        if self._worker_server is None:
            return self.start(*arguments).wait()
        began_s = time.monotonic()
        script = str(Path(sys.executable).with_name("ftray"))
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Path(os.devnull).open("rb") as nothing:
            streams = [nothing.fileno(), out.fileno(), err.fileno()]
            code = self._worker_server.run([script, *arguments], self.env, self.directory, streams, DEADLINE_S)
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode(errors="replace"))
        assert "Traceback" not in "".join(texts), f"ftray {' '.join(arguments)} printed a traceback:\n{''.join(texts)}"
        return Ended(code, *texts, time.monotonic() - began_s)

    def left_over(self, within_s: float = 90.0) -> list[str]:
        """Processes of this place that still live; those that are about to go get `within_s`."""
        end = time.monotonic() + within_s
        while (left := self._processes()) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    def _processes(self) -> list[str]:
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.info['cmdline'] or [])[:120]}")
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        if self._worker_server:  # a fork's /proc/…/environ is that of the server
            found += [f"{worker.pid} {worker.name()}" for worker in self._worker_server.workers()]
        return found

    def close(self) -> None:
        """Ends what commands left behind."""
        for line in self._processes():
            try:
                psutil.Process(int(line.split()[0])).kill()
            except psutil.NoSuchProcess:
                continue


def assert_refused(ended: Ended, *fragments: str, code: int = 2) -> None:
    """One line on stderr for the user, with all fragments in it, and the exit code."""
    assert ended.code == code, f"exit code {ended.code}:\n{ended.out}{ended.err}"
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("ftray: ")
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in: {lines[0]}"
