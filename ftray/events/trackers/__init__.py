"""Experiment trackers: TensorBoard, MLflow and Weights & Biases get the committed metrics, as `metrics.jsonl` has them.

A thread of the driver updates each tracker after a checkpoint, with the whole committed timeline. A tracker that fails or is
slow delays nothing. What a tracker has is read from it, or kept beside it, so that a run that was killed continues its curve:
each step is there once.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ftray import config, storage
from ftray.errors import ConfigError, Interrupted, Preempted
from ftray.events.trackers.base import Segment, Tracker
from ftray.events.trackers.mlflow import MLflow
from ftray.events.trackers.tensorboard import TensorBoard
from ftray.events.trackers.wandb import Wandb
from ftray.redact import redacted

TRACKERS: dict[str, Callable[[config.RunConfig, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
}
LIBRARIES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # tracker → module
COMMIT_S = 10.0  # from the start of a checkpoint to its commit, about
END_S = 60.0  # that trackers get when a command ends
HASTE_S = 5.0  # that they get when the machine goes away, or after a second Ctrl-C
ReadSegments = Callable[[str, dict[str, Segment]], list[Segment]]  # `catalog.read_segments`


def check_trackers(run: config.RunConfig) -> None:
    """Raises ConfigError for a tracker whose library is missing, or that has nowhere to write."""
    for name in run.tracking.trackers:
        if importlib.util.find_spec(LIBRARIES[name]) is None:
            raise ConfigError(
                f"tracking.trackers contains {name}, but its library is not installed: pip install 'ftray[{name}]', or remove it"
            )
        if name == "mlflow" and storage.is_remote(run.directory) and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                f"tracking.trackers contains mlflow, which cannot write files to {run.storage}; set MLFLOW_TRACKING_URI to a "
                "server or a directory, or remove it"
            )


@contextmanager
def follow_run(
    run: config.RunConfig,
    run_dir: str,
    read_segments: ReadSegments,
    warn: Callable[[str], None],
    is_ours: Callable[[], bool] = lambda: True,
) -> Iterator[Callable[[], None]]:
    """Updates the run's trackers while it trains, and at the end.

    Args:
        run: The run's configuration.
        run_dir: The run's directory.
        read_segments: Reads the committed metrics.
        warn: Gets one message about each tracker that fails.
        is_ours: Whether the run is still this process's; if not, trackers get nothing more.

    Yields:
        A function to be called when a checkpoint starts.
    """
    threads = [_TrackerThread(name, run, run_dir, read_segments, warn, is_ours) for name in run.tracking.trackers]
    for thread in threads:
        thread.start()
    limit_s, state = END_S, "FAILED"

    def wake() -> None:
        for thread in threads:
            thread.news.set()

    try:
        yield wake
        state = "FINISHED"
    except (Preempted, Interrupted, KeyboardInterrupt):
        limit_s, state = HASTE_S, "KILLED"
        raise
    finally:
        end_s = time.monotonic() + limit_s
        for thread in threads:
            thread.state = state
            thread.ended.set()
        wake()
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))
            if thread.is_alive():
                warn(f"{thread.name} is not done after {limit_s:.0f} s; its curves may lack the last steps")
                thread.abandon()


class _TrackerThread(threading.Thread):
    """Updates one tracker. A failure is reported once; the next checkpoint is another try."""

    def __init__(
        self,
        name: str,
        run: config.RunConfig,
        run_dir: str,
        read_segments: ReadSegments,
        warn: Callable[[str], None],
        is_ours: Callable[[], bool],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._run, self._run_dir, self._read_segments, self._is_ours = run, run_dir, read_segments, is_ours
        self._warn: Callable[[str], None] | None = warn
        self._tracker: Tracker | None = None
        self.news, self.ended, self.state = threading.Event(), threading.Event(), ""

    def abandon(self) -> None:
        """There is no more time."""
        self._warn = None
        if self._tracker is not None:
            self._tracker.abandon()

    def run(self) -> None:
        """Updates the tracker after each checkpoint, and at the end."""
        segments: dict[str, Segment] = {}
        is_last = False
        while not is_last:
            self.news.wait()
            self.news.clear()
            is_last = self.ended.wait(COMMIT_S)
            if not self._is_ours():
                return
            try:
                if self._tracker is None:
                    self._tracker = TRACKERS[self.name](self._run, self._run_dir)
                self._tracker.update(self._read_segments(self._run_dir, segments))
                if is_last:
                    self._tracker.close(self.state)
            except Exception as err:  # noqa: BLE001 - whatever a library raises, the run continues
                self._failed(err)

    def _failed(self, err: Exception) -> None:
        if self._tracker is not None:
            self._tracker.abandon()
        self._tracker = None
        if self._warn is not None:
            text = redacted(" ".join(str(err).split())[:200])
            self._warn(
                f"{self.name} could not be updated ({type(err).__name__}: {text}). The run continues, and metrics.jsonl is "
                "complete; the tracker is updated at a later checkpoint, or when the run is continued"
            )
            self._warn = None
