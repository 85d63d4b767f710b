"""Starts Ray workers as forks of a process that has already imported torch, DeepSpeed and PEFT.

A new training worker spends about ten CPU seconds on imports, and the tests start hundreds of workers. With
`runtime_env={"py_executable": …}` Ray starts this file instead of `python default_worker.py`. It asks the fork server for a
worker, waits until that worker ends, and exits with its exit code. Ray itself is imported after the fork, because
it reads its settings from the environment of the worker.
"""

from __future__ import annotations

import array
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

SOCKET = "FTRAY_TEST_FORK_SOCKET"
PRELOADED = (
    "torch", "transformers.models.auto.modeling_auto", "accelerate", "deepspeed", "bitsandbytes", "peft",
    "pandas", "pyarrow.parquet", "fsspec",
    "aiohttp", "pydantic",
)  # fmt: skip


@dataclass(frozen=True)
class ForkServer:
    """A running fork server. environment: the variables with which `ray.init` uses it."""

    environment: dict[str, str]
    process: psutil.Process

    def run(
        self, arguments: list[str], environment: dict[str, str], directory: Path, streams: list[int], timeout_s: float
    ) -> int:
        """Runs a Python script in a fork, with stdin, stdout and stderr. Returns its exit code.

        Raises:
            TimeoutError: The script still runs after `timeout_s`.
        """
        return _request(self.environment[SOCKET], [arguments, environment, str(directory), 0], streams, timeout_s)

    def workers(self) -> list[psutil.Process]:
        """The forked workers that are alive."""
        return [p for p in self.process.children() if p.status() != "zombie"]


@contextmanager
def fork_server() -> Iterator[ForkServer]:
    """Runs a fork server."""
    import psutil  # not where this file runs as a script without site-packages

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", path], env=os.environ | {"DEEPSPEED_LOG_LEVEL": "error"}
        )
        try:
            while not Path(path).exists():
                assert server.poll() is None, "the fork server did not start"
                time.sleep(0.05)
            executable = f"{sys.executable} -S -E {__file__}"
            environment = {
                SOCKET: path,
                "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(
                    {"runtime_env": {"py_executable": executable}, "metadata": {}}
                ),
                # Prestarted workers have no runtime environment, so no task would use them.
                "RAY_enable_worker_prestart": "0",
                "RAY_prestart_worker_first_driver": "0",
            }
            yield ForkServer(environment, psutil.Process(server.pid))
        finally:
            server.kill()
            server.wait()


def request_worker() -> int:
    """Asks the fork server for a worker with this process's arguments, environment and streams. Returns its exit code."""
    return _request(os.environ[SOCKET], [sys.argv[1:], dict(os.environ), str(Path.cwd()), os.nice(0)], [0, 1, 2], None)


def _request(path: str, fields: list[object], streams: list[int], timeout_s: float | None) -> int:
    request = json.dumps(fields).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        server.sendmsg([len(request).to_bytes(8, "big")], [rights])
        server.sendall(request)
        server.settimeout(timeout_s)
        code = server.recv(16)  # empty if the process was killed
        return int(code or 1)


def serve(path: str) -> None:
    """Forks workers until the parent process is gone."""
    parent = os.getppid()
    for name in PRELOADED:
        __import__(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(128)
    listener.settimeout(1)
    Path(f"{path}.new").rename(path)
    while os.getppid() == parent:
        try:
            client, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            run_worker(client)
        client.close()


def run_worker(client: socket.socket) -> None:
    """Becomes the worker that the client asked for, in a forked process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    client.settimeout(None)
    header, control, _, _ = client.recvmsg(8, socket.CMSG_SPACE(12))
    streams = array.array("i", control[0][2])
    arguments, environment, directory, niceness = json.loads(client.makefile("rb").read(int.from_bytes(header, "big")))
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    os.setsid()
    os.nice(max(0, niceness - os.nice(0)))
    sys.argv = arguments
    sys.path[:0] = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(request_worker())
