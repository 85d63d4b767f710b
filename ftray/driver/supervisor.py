"""Restarts worker groups: each at the newest checkpoint, with as many workers as the cluster can hold.

A run may fail any number of times while it makes progress; it ends when it fails `scale.max_failures` + 1 times in a row without
a new checkpoint in between.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray.exceptions import RayError

from ftray import config, storage
from ftray.compat.ray import draining_nodes
from ftray.console import Console, duration
from ftray.driver.resources import Resources, free_nodes, max_workers, usable_nodes, world_size_for
from ftray.driver.worker_group import LEAVE_AT_ONCE, OVERTAKEN, GroupResult
from ftray.errors import Interrupted, Preempted, RunError, RunHeldError, StorageError
from ftray.network import is_listening
from ftray.signals import is_termination, received_signals, signal_handler, termination_signals
from ftray.train.checkpoint.catalog import list_checkpoints
from ftray.train.driver_channel import WorkerLocation
from ftray.train.failures import explain

POLL_NODES_S = 3.0
RETRY_SIZE_S = 300.0  # until a size that could not be placed is tried again
RETRY_DELAY_S, MAX_RETRY_DELAY_S = 5.0, 30.0
CONTINUE = "run the same command again to continue"
StopReason = Callable[[list[WorkerLocation]], str]  # why a group with these workers should stop; "" if it should not


def supervise(
    run: config.RunConfig,
    run_dir: str,
    use_gpu: bool,
    start: Callable[[int, StopReason], GroupResult],
    console: Console,
    lease: storage.Lease | None,
    caught: list[int] | None = None,
) -> None:
    """Runs worker groups until one has trained to the end.

    Args:
        run: The run's configuration.
        run_dir: The run's directory.
        use_gpu: Whether workers use GPUs.
        start: Runs a group with this number of workers and returns how it ended.
        console: Shows what happens.
        lease: The right to write the run.
        caught: Signals that the run is to obey, where the caller handles them.

    Raises:
        Interrupted, Preempted, RunHeldError, RunError: The run ends before its last step.
        FtrayError: What a worker raised and a retry will not fix.
    """
    failures, failed_at, size = 0, -1, 0
    with stop_signals(console) if caught is None else nullcontext(caught) as signals:
        cluster = WorkerSupply(run, use_gpu, console, signals, lease)
        while True:
            size = cluster.wait_for_resources(run_dir, size)
            result = _start(start, size, cluster.stop_reason)
            step = _newest_step(run_dir)
            if result.finished and (caught is not None or not signals):
                return
            _raise_if_over(result, signals, step, lease)
            if result.not_placed:
                cluster.avoid(size)
            elif result.failure:
                failures = failures + 1 if step == failed_at else 1
                failed_at = step
                _check_failures(run, result.failure, failures, step, console)
                _pause(min(MAX_RETRY_DELAY_S, RETRY_DELAY_S * (failures - 1)), signals)  # most failures pass at once
            else:
                console.say(f"train: stopped the workers at step {step}: {result.stop_reason}")


@contextmanager
def store_lost() -> Iterator[None]:
    """Once a run has started, a store that is gone is not invalid input. Raises RunError, which says how to continue."""
    try:
        yield
    except StorageError as err:
        raise RunError(f"{err}. All committed checkpoints are intact; {CONTINUE}") from None


def _start(start: Callable[[int, StopReason], GroupResult], size: int, stop_reason: StopReason) -> GroupResult:
    try:
        return start(size, stop_reason)
    except RayError as err:
        if not is_listening(ray.get_runtime_context().gcs_address):
            raise  # without the cluster's head nothing can continue
        return GroupResult(False, failure=f"the driver lost contact with its workers ({explain(err)})")


def _pause(seconds: float, signals: list[int]) -> None:
    end_s = time.monotonic() + seconds
    while not signals and time.monotonic() < end_s:
        time.sleep(0.2)


def _check_failures(run: config.RunConfig, failure: str, failures: int, step: int, console: Console) -> None:
    """Raises RunError after too many failures in a row."""
    allowed = run.scale.max_failures
    if failures > allowed:
        times = (
            f" {failures} times in a row without a new checkpoint (scale.max_failures: {allowed})" if allowed else ""
        )
        raise RunError(f"training failed{times}: {failure}. {_where(step)}; {CONTINUE}")
    console.warn(f"{failure}; restarting from step {step} (failure {failures} of at most {allowed} in a row)")


def _raise_if_over(result: GroupResult, signals: list[int], step: int, lease: storage.Lease | None) -> None:
    if lease is not None and lease.overtaken:
        raise RunHeldError(
            "another process took over the run because this one did not renew its lease; watch that process instead"
        )
    if isinstance(result.error, StorageError):  # storage was checked before workers started
        raise RunError(f"{result.error}. {_where(step)}; {CONTINUE}")
    if result.error is not None:
        raise result.error
    if signals:
        _raise_interrupted(signals, step)


def _raise_interrupted(signals: list[int], step: int) -> None:
    if is_termination(signals[0]):
        raise Preempted(f"preempted at step {step}; {CONTINUE}")
    where = f"checkpoint of step {step} is committed" if step else "no step was done"
    raise Interrupted(f"interrupted; {where}; {CONTINUE}")


def _where(step: int) -> str:
    return f"The checkpoint of step {step} is intact" if step else "There is no checkpoint yet"


def _newest_step(run_dir: str) -> int:
    checkpoints = list_checkpoints(run_dir)
    return checkpoints[0].step if checkpoints else 0


@contextmanager
def stop_signals(console: Console) -> Iterator[list[int]]:
    """The signals received so far.

    The first Ctrl-C, SIGTERM or SIGHUP makes the workers commit a checkpoint and stop; another Ctrl-C ends at once.
    """
    caught = received_signals()

    def handle(number: int, _: Any) -> None:
        caught.append(number)
        if len(caught) > 1:
            if number == signal.SIGINT:  # SIGTERM often comes twice: to the process, and to its group
                raise KeyboardInterrupt
            return
        console.say("stopping after this step, committing a checkpoint (Ctrl-C again: end at once) …")

    with signal_handler(handle, (signal.SIGINT, *termination_signals())):
        yield caught


class WorkerSupply:
    """How many workers the cluster can hold, and why a group should stop: signals, a lost lease, a node's notice, growth."""

    def __init__(
        self, run: config.RunConfig, use_gpu: bool, console: Console, signals: list[int], lease: storage.Lease | None
    ) -> None:
        self._run, self._use_gpu, self._console, self._signals, self._lease = run, use_gpu, console, signals, lease
        self._size, self._polled_s, self._has_warned = 0, 0.0, False
        self._largest = run.world_sizes[0]  # lowered while others hold the resources
        self._waiting_since_s: float | None = None
        self._not_before: dict[int, float] = {}  # by size: it could not be placed

    def wait_for_resources(self, run_dir: str, before: int) -> int:
        """The size of the next group; waits up to `scale.wait_s` for nodes. before: Size of the previous group, or 0."""
        has_warned = False
        while True:
            available = max_workers(self._run.scale, self._use_gpu, usable_nodes())
            if self._signals:
                _raise_interrupted(self._signals, _newest_step(run_dir))
            size = world_size_for(self._run, min(available, self._largest))
            if size is not None:
                if before and size != before:
                    self._console.say(f"train: continuing with {size} workers instead of {before}")
                self._size, self._polled_s = size, time.monotonic()
                return size
            self._waiting_since_s = self._waiting_since_s or time.monotonic()
            fewest, wait_s = self._run.world_sizes[-1], self._run.scale.wait_s
            shortage = (
                f"the cluster has room for {available} worker{'' if available == 1 else 's'}, but the run needs at least "
                f"{fewest} (scale.num_workers)"
            )
            if not has_warned:
                self._console.warn(f"{shortage}; waiting up to {duration(wait_s)} (scale.wait_s) for nodes")
                has_warned = True
            if time.monotonic() - self._waiting_since_s > wait_s:
                raise Preempted(f"for {duration(wait_s)}, {shortage}. {_where(_newest_step(run_dir))}; {CONTINUE}")
            time.sleep(min(1.0, wait_s))

    def avoid(self, size: int) -> None:
        """A group of this size could not be placed.

        Either a node that Ray counted as alive was gone (Ray knows by now), or other jobs hold the resources. In that case
        the next group is smaller, if the settings allow it.
        """
        if max_workers(self._run.scale, self._use_gpu, usable_nodes()) < size:
            return
        self._waiting_since_s = self._waiting_since_s or time.monotonic()
        self._not_before[size] = time.monotonic() + RETRY_SIZE_S
        smaller = world_size_for(self._run, size - 1)
        self._largest = smaller or size
        wait_s = self._run.scale.wait_s
        if smaller is None and time.monotonic() - self._waiting_since_s > wait_s:
            raise Preempted(
                f"for {duration(wait_s)}, other jobs have been using the resources that {size} workers need; {CONTINUE}"
            )
        next_try = f"trying {smaller} workers" if smaller else "trying again"
        self._console.warn(f"{size} workers could not be placed, because other jobs hold the resources; {next_try}")

    def stop_reason(self, workers: list[WorkerLocation]) -> str:
        """Why the group should stop now; "" if it should not."""
        if workers:
            self._waiting_since_s = None
        if self._signals:
            return LEAVE_AT_ONCE
        if self._lease is not None:
            if self._lease.overtaken:
                return OVERTAKEN
            if self._lease.lost and not self._has_warned:
                self._console.warn("the store does not answer; training continues, checkpoints wait for it")
            self._has_warned = self._lease.lost
        if time.monotonic() - self._polled_s < POLL_NODES_S:
            return ""
        self._polled_s = time.monotonic()
        leaving = draining_nodes()
        if lost := [worker for worker in workers if worker.node_id in leaving]:
            return f"the node {lost[0].host} will be taken away"
        larger = self.growth(usable_nodes(), free_nodes()) if workers else None
        if larger is not None:
            self._largest = larger
            return f"the cluster has room for {larger} workers"
        return ""

    def growth(self, nodes: list[Resources], free: list[Resources]) -> int | None:
        """A larger group that the cluster can hold, if any. free: Resources of each node that nobody holds."""
        size = world_size_for(self._run, max_workers(self._run.scale, self._use_gpu, nodes))
        if size is None or size <= self._size or time.monotonic() < self._not_before.get(size, 0):
            return None
        return size if self._size + max_workers(self._run.scale, self._use_gpu, free) >= size else None
