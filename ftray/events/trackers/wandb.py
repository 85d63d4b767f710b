"""Weights & Biases: a run named like ftray's, online if WANDB_MODE or a WANDB_API_KEY says so, else offline."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftray import config, storage
from ftray.events.trackers.base import Segment, metric_values, tracker_id


class Wandb:
    """Talks to W&B in a separate process (`wandb_process`): the library keeps a process alive, and its backlog is unknown.

    Offline, all is written as the command ends: what W&B has not flushed is lost in a kill. The files are in WANDB_DIR, else in
    `<run>/wandb/` (of a run in S3: in ftray's cache on the driver's machine), once they are complete; the last step that they
    hold is in `<run>/trackers/wandb.json`. Online, W&B knows the last step.
    """

    def __init__(self, run: config.RunConfig, run_dir: str) -> None:
        self._last_step_uri = storage.join(run_dir, "trackers", "wandb.json")
        local = storage.cache_directory() / "wandb" / run.name if storage.is_remote(run_dir) else Path(run_dir)
        self._directory = Path(os.environ.get("WANDB_DIR") or local)
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._is_online = mode == "online"
        self._settings = {"name": run.name, "id": tracker_id(run_dir), "config_hash": run.config_hash, "mode": mode}
        self._lines: list[dict[str, Any]] = []
        self._process: subprocess.Popen[str] | None = None
        self._last = -1 if self._is_online else _last_offline_step(self._last_step_uri)

    def update(self, segments: list[Segment]) -> None:
        """Online, logs what W&B does not have yet; offline, keeps it until the end."""
        if self._is_online and self._process is None:
            self._last = self._open(self._directory)
        self._lines = [line for line in itertools.chain.from_iterable(segments) if line["step"] > self._last]
        if self._is_online:
            self._log()

    def close(self, state: str) -> None:
        """Finishes the run; offline, writes it first."""
        if self._is_online:
            self._end(state)
        elif self._lines:
            unfinished = self._directory / ".unfinished-wandb"  # left by a command that was killed, if it is there
            shutil.rmtree(unfinished, ignore_errors=True)
            self._open(unfinished)
            self._log()
            self._end(state)
            (self._directory / "wandb").mkdir(exist_ok=True)
            for path in (unfinished / "wandb").glob("offline-run-*"):
                path.rename(self._directory / "wandb" / path.name)
            storage.write_bytes(self._last_step_uri, json.dumps({"step": self._last}).encode())
            shutil.rmtree(unfinished, ignore_errors=True)

    def abandon(self) -> None:
        """Kills the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _open(self, directory: Path) -> int:
        """Starts the process; returns the last step that W&B has."""
        directory.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({**self._settings, "dir": str(directory)})
        self._process = subprocess.Popen(  # nosec B603 # a list of words, no shell
            [sys.executable, "-m", "ftray.events.trackers.wandb_process", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for ftray
        )
        return int(self._reply()["last"])

    def _reply(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        reply: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def _log(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        for line in self._lines:
            message = {"step": line["step"], "values": metric_values(line) | {"unix_s": line["unix_s"]}}
            self._process.stdin.write(json.dumps(message) + "\n")
            self._last = int(line["step"])
        self._process.stdin.flush()

    def _end(self, state: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"state": state}) + "\n")
        self._process.stdin.close()
        self._reply()
        self._process.wait()
        self._process = None


def _last_offline_step(uri: str) -> int:
    """The last step that was written offline; -1, so that all are written again, where it is unknown."""
    try:
        step = (storage.find_object(uri) or {}).get("step")
    except storage.DamagedFile:
        return -1
    return step if isinstance(step, int) else -1
