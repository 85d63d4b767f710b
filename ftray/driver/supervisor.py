"""What follows when a group of workers ends: a new one at the newest checkpoint, of the size there is room for, or the end.

A run may fail any number of times while it moves on; it ends when it fails `scale.max_failures` + 1 times in a row
without a new checkpoint between. Knows groups and room for them; nothing of data or models.
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
from ftray.driver.resources import Resources, fitting, free_nodes, usable_nodes, world_size_for
from ftray.driver.worker_group import LEAVE_AT_ONCE, OVERTAKEN, GroupResult
from ftray.errors import Interrupted, Preempted, RunError, RunHeldError, StorageError
from ftray.network import is_listening
from ftray.signals import is_termination, signal_handler, termination_signals
from ftray.train.checkpoint.catalog import list_checkpoints
from ftray.train.driver_channel import WorkerLocation
from ftray.train.failures import explain

LOOK_S = 3.0  # between two looks at the cluster's nodes
GROW_AGAIN_S = 300.0  # after a size was given no room
AGAIN = "run the same command again to continue"
Wish = Callable[[list[WorkerLocation]], str]


def supervise(
    run: config.RunConfig,
    run_dir: str,
    use_gpu: bool,
    start: Callable[[int, Wish], GroupResult],
    console: Console,
    lease: storage.Lease | None,
    caught: list[int] | None = None,
) -> None:
    """Runs groups until one is trained to the end. start: starts one of so many workers and returns how it ended.

    caught: gets a signal's number when the run is to stop as at that signal, where others watch the signals.
    Raises Interrupted, Preempted, RunHeldError, RunError, and what a group says that trying again won't cure.
    """
    failures, failed_at, size = 0, -1, 0
    with stop_signals(console) if caught is None else nullcontext(caught) as stopped:
        cluster = WorkerSupply(run, use_gpu, console, stopped, lease)
        while True:
            size = cluster.wait_for_room(run_dir, size)
            ended = _start(start, size, cluster.wish)
            step = _newest(run_dir)
            if ended.finished and (caught is not None or not stopped):
                return
            _raise_if_over(ended, stopped, step, lease)
            if ended.no_room:
                cluster.avoid(size)
            elif ended.failure:
                failures = failures + 1 if step == failed_at else 1
                failed_at = step
                _judge(run, ended.failure, failures, step, console)
                _pause(min(30.0, 5.0 * (failures - 1)), stopped)  # at once after the first: most pass
            else:
                console.say(f"train: {ended.wish}; its workers left at step {step}")


@contextmanager
def store_lost() -> Iterator[None]:
    """Once a run has started, a store that is gone is no wrong input. Raises RunError, which says how to continue."""
    try:
        yield
    except StorageError as err:
        raise RunError(f"{err}. What was committed is sound; {AGAIN}") from None


def _start(start: Callable[[int, Wish], GroupResult], size: int, wish: Wish) -> GroupResult:
    try:
        return start(size, wish)
    except RayError as err:
        if not is_listening(ray.get_runtime_context().gcs_address):
            raise  # with the cluster's head there is nothing to go on with
        return GroupResult(False, failure=f"the driver lost sight of its workers ({explain(err)})")


def _pause(seconds: float, caught: list[int]) -> None:
    end_s = time.monotonic() + seconds
    while not caught and time.monotonic() < end_s:
        time.sleep(0.2)


def _judge(run: config.RunConfig, failure: str, failures: int, step: int, console: Console) -> None:
    allowed = run.scale.max_failures
    if failures > allowed:
        times = (
            f" {failures} times in a row without a new checkpoint (scale.max_failures: {allowed})" if allowed else ""
        )
        raise RunError(f"training failed{times}: {failure}. {_where(step)}; {AGAIN}")
    console.warn(f"{failure}; starting anew from step {step} (failure {failures}, allowed in a row: {allowed})")


def _raise_if_over(ended: GroupResult, caught: list[int], step: int, lease: storage.Lease | None) -> None:
    if lease is not None and lease.overtaken:
        raise RunHeldError("another process took the run over while this one gave no sign of life; follow that one")
    if isinstance(ended.error, StorageError):  # not the user's input any more: it was looked at before workers started
        raise RunError(f"{ended.error}. {_where(step)}; {AGAIN}")
    if ended.error is not None:
        raise ended.error
    if caught:
        _raise_interrupted(caught, step)


def _raise_interrupted(caught: list[int], step: int) -> None:
    if is_termination(caught[0]):
        raise Preempted(f"preempted at step {step}; {AGAIN}")
    where = f"checkpoint of step {step} is committed" if step else "no step was done"
    raise Interrupted(f"interrupted; {where}; {AGAIN}")


def _where(step: int) -> str:
    return f"The checkpoint of step {step} is sound" if step else "There is no checkpoint yet"


def _newest(run_dir: str) -> int:
    found = list_checkpoints(run_dir)
    return found[0].step if found else 0


@contextmanager
def stop_signals(console: Console) -> Iterator[list[int]]:
    """The signals that came.

    The first Ctrl-C, SIGTERM or SIGHUP asks the workers to commit and leave; a Ctrl-C after it ends at once.
    """
    caught: list[int] = []

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
    """The room for workers, and what asks a group to leave: signals, a lost lease, a node's notice, more room."""

    def __init__(
        self, run: config.RunConfig, use_gpu: bool, console: Console, caught: list[int], lease: storage.Lease | None
    ) -> None:
        self._run, self._use_gpu, self._console, self._caught, self._lease = run, use_gpu, console, caught, lease
        self._size, self._looked_s, self._told_lost = 0, 0.0, False
        self._most = run.world_sizes[0]  # lowered where others hold the room
        self._since_s: float | None = None  # when the wait for room began
        self._not_before: dict[int, float] = {}  # by size: it was given no room

    def wait_for_room(self, run_dir: str, before: int) -> int:
        """How many workers the next group has; waits up to `scale.wait_s` for nodes. before: the group before it, or 0."""
        told = False
        while True:
            room = fitting(self._run.scale, self._use_gpu, usable_nodes())
            if self._caught:
                _raise_interrupted(self._caught, _newest(run_dir))
            size = world_size_for(self._run, min(room, self._most))
            if size is not None:
                if before and size != before:
                    self._console.say(f"train: going on with {size} workers instead of {before}")
                self._size, self._looked_s = size, time.monotonic()
                return size
            self._since_s = self._since_s or time.monotonic()
            fewest, wait_s = self._run.world_sizes[-1], self._run.scale.wait_s
            lacks = f"the cluster has room for {room} of at least {fewest} workers (scale.num_workers)"
            if not told:
                self._console.warn(f"{lacks}; waiting up to {duration(wait_s)} (scale.wait_s) for nodes")
                told = True
            if time.monotonic() - self._since_s > wait_s:
                raise Preempted(f"{lacks} since {duration(wait_s)}. {_where(_newest(run_dir))}; {AGAIN}")
            time.sleep(min(1.0, wait_s))

    def avoid(self, size: int) -> None:
        """A group of this size did not start. Either a node is gone that counted as alive, which shows by now, or others
        hold the room: then the next group is smaller where that is allowed."""
        if fitting(self._run.scale, self._use_gpu, usable_nodes()) < size:
            return
        self._since_s = self._since_s or time.monotonic()
        self._not_before[size] = time.monotonic() + GROW_AGAIN_S
        smaller = world_size_for(self._run, size - 1)
        self._most = smaller or size
        wait_s = self._run.scale.wait_s
        if smaller is None and time.monotonic() - self._since_s > wait_s:
            raise Preempted(f"others hold the room that {size} workers need since {duration(wait_s)}; {AGAIN}")
        self._console.warn(f"{size} workers were given no room, others hold it; trying {smaller or 'again'}")

    def wish(self, places: list[WorkerLocation]) -> str:
        """Why the group should leave now; "" if it should stay."""
        if places:
            self._since_s = None
        if self._caught:
            return LEAVE_AT_ONCE
        if self._lease is not None:
            if self._lease.overtaken:
                return OVERTAKEN
            if self._lease.lost and not self._told_lost:
                self._console.warn("the store gives no answer; training goes on, checkpoints wait for it")
            self._told_lost = self._lease.lost
        if time.monotonic() - self._looked_s < LOOK_S:
            return ""
        self._looked_s = time.monotonic()
        leaving = draining_nodes()
        if lost := [place for place in places if place.node_id in leaving]:
            return f"the node {lost[0].host} will be taken away"
        grown = self.growth(usable_nodes(), free_nodes()) if places else None
        if grown is not None:
            self._most = grown
            return f"there is room for {grown} workers"
        return ""

    def growth(self, nodes: list[Resources], free: list[Resources]) -> int | None:
        """The larger group that there is room for, if any. free: what nobody holds of each of the nodes."""
        grown = world_size_for(self._run, fitting(self._run.scale, self._use_gpu, nodes))
        if grown is None or grown <= self._size or time.monotonic() < self._not_before.get(grown, 0):
            return None
        return grown if self._size + fitting(self._run.scale, self._use_gpu, free) >= grown else None
