"""The driver's side of training: from a run file to a finished run in storage.

Everything that can be wrong is looked at here, before a worker starts: storage, identity, model, data, resources. Then
Ray Train runs `worker.train_worker`, group after group (`supervise`); this side shows progress.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray import config, storage
from ftray.console import Console, duration
from ftray.data.loader import LoaderConfig, LoadPlan, eval_table
from ftray.data.prepare import PreparedData, prepare_data
from ftray.driver.lineage import record_lineage, what_changed
from ftray.driver.resources import check_resources
from ftray.driver.run_record import parent_of, versions
from ftray.driver.supervisor import Wish, store_lost, supervise
from ftray.driver.trackers import tracked
from ftray.driver.worker_group import GlooBackend, GroupResult, HangDetector, run_group
from ftray.errors import ConfigError, DataError, Interrupted, Preempted, RunError, RunHeldError, StorageError
from ftray.events.alerts import AlertMonitor
from ftray.events.bus import ConsoleSubscriber, EventBus, Subscriber
from ftray.events.event_log import EventLog
from ftray.events.types import CheckpointStarted, Event, GroupFailed
from ftray.model.load import absolute_base, load_tokenizer, template_hash, tokenizer_hash
from ftray.train.checkpoint.catalog import CheckpointRef, find_newest, list_checkpoints, merge_metrics, read_metrics
from ftray.train.driver_channel import DriverChannel
from ftray.train.failures import explain
from ftray.train.job import TrainJob
from ftray.train.worker import train_worker

START_S = "20"  # seconds that Ray Train tries to place a group of workers


@dataclass(frozen=True)
class TrialHooks:
    """Hooks for a sweep that runs this training job as one of its trials.

    Attributes:
        subscriber: Follows the trial. After an eval the workers wait until its handlers return.
        caught: Signals; the run stops as if it had received them.
        data: Data that the trials share; None if the run prepares its own.
        heldout: Reference to the table of eval sequences that the trials share.
    """

    subscriber: Subscriber
    caught: list[int]
    data: PreparedData | None = None
    heldout: Any = None


def train(
    run: config.RunConfig,
    run_dir: str,
    console: Console,
    lease: storage.Lease | None = None,
    follower: TrialHooks | None = None,
    subscribers: Sequence[Subscriber] = (),
) -> CheckpointRef:
    """Trains a run to its end; returns its last checkpoint. Needs a started Ray, and the run's lease.

    subscribers: follow the run's events, metrics for example.

    Raises DataError, ConfigError before any worker starts; Interrupted after Ctrl-C with a committed checkpoint;
    Preempted after SIGTERM; RunError when workers fail more often than allowed.
    """
    use_gpu = _wait_for_resources(run, run_dir, console)
    data = follower.data if follower else None
    load = partial(load_tokenizer, absolute_base(run.model))
    tokenizer = load()
    if data is None:
        data = prepare_data(run, run_dir, console, load, tokenizer_hash(tokenizer))
    newest = find_newest(run_dir, console.warn)
    check_checkpoint(newest, data, run, run_dir, tokenizer)
    if newest is not None and newest.progress.finished:
        merge_metrics(run_dir, newest.progress, console.warn)
        console.say(f"training is complete ({newest.step} steps); nothing to do")
        return newest
    say_plan(run, data, newest, console)
    job = _job(run, run_dir, data, tokenizer, lease, follower)

    def is_ours() -> bool:
        return lease is None or not lease.overtaken

    journal = EventLog(run_dir, is_ours)
    step = newest.step if newest else 0
    watch = AlertMonitor(run, data.plan.num_steps, _lines_before(run_dir, console))
    with (
        journal.session(step),
        tracked(run, run_dir, console.warn, is_ours) as committed_one,
        console.progress("train: step", data.plan.num_steps, step) as bar,
    ):
        bus = EventBus()
        ConsoleSubscriber(console, bar).subscribe(bus)
        journal.subscribe(bus)
        bus.subscribe(CheckpointStarted, lambda _: committed_one())
        watch.subscribe(bus, console.warn)
        for subscriber in (*subscribers, *([follower.subscriber] if follower else [])):
            subscriber.subscribe(bus)

        def start(world_size: int, wish: Wish) -> GroupResult:
            try:
                ended = _start(job, world_size, data.plan, use_gpu, wish, bus.emit)
            except RayError as err:
                journal.write(GroupFailed(explain(err)))
                raise
            journal.group_ended(ended.event_type, ended.why)
            return ended

        try:
            with store_lost():
                supervise(run, run_dir, use_gpu, start, console, lease, follower.caught if follower else None)
        except (Interrupted, Preempted, RunError):
            with suppress(StorageError):
                if committed := list_checkpoints(run_dir):
                    merge_metrics(run_dir, committed[0].progress)
            raise
    return _last_checkpoint(run_dir, console)


def _last_checkpoint(run_dir: str, console: Console) -> CheckpointRef:
    """The checkpoint that training ended with. Raises RunError where there is none."""
    with store_lost():
        last = find_newest(run_dir, console.warn)
        if last is None:
            raise RunError(f"{run_dir} has no checkpoint although training ended; look at the log file")
        merge_metrics(run_dir, last.progress, console.warn)
    return last


def _lines_before(run_dir: str, console: Console) -> list[dict[str, Any]]:
    """Metrics that alerts continue from: the first and the newest."""
    try:
        return read_metrics(run_dir, most=50, warn=console.warn)
    except StorageError as err:
        console.warn(f"alerts start without earlier metrics, which cannot be read: {err}")
        return []


def _job(
    run: config.RunConfig,
    run_dir: str,
    data: PreparedData,
    tokenizer: Any,
    lease: storage.Lease | None,
    follower: TrialHooks | None,
) -> TrainJob:
    """What each worker is handed; what it is made from is recorded in the run. Raises RunHeldError."""
    heldout = follower.heldout if follower else None
    if heldout is None and data.eval_stream and data.eval_index and run.evaluate.every:
        heldout = ray.put(eval_table(data.eval_index, data.eval_stream))
    if lease is not None and not storage.holds(lease.token):
        raise RunHeldError("another process took the run over while this one gave no sign of life; follow that one")
    lineage = record_lineage(
        run, run_dir, data, tokenizer_hash(tokenizer), template_hash(tokenizer), parent_of(run_dir)
    )
    hashes = {"config_hash": run.config_hash, "data_hash": data.data_hash, "lineage": lineage}
    meta = {**hashes, "versions": versions()}
    there = run.model_copy(update={"model": absolute_base(run.model)})
    held = lease.token if lease is not None else None
    return TrainJob(there, run_dir, meta, heldout, None, parent_of(run_dir), held, waits=follower is not None)


def _wait_for_resources(run: config.RunConfig, run_dir: str, console: Console) -> bool:
    """As `check_resources`; on a cluster a run that has a checkpoint waits for nodes to come back, `scale.wait_s` at most.

    A Ray of this command's own never gets more of them.
    """
    end_s, told = time.monotonic() + run.scale.wait_s, False
    while True:
        try:
            return check_resources(run)
        except ConfigError as err:
            if os.environ.get("RAY_ADDRESS", "local") in ("", "local") or not list_checkpoints(run_dir):
                raise
            if time.monotonic() > end_s:
                raise Preempted(f"{err}; waited {duration(run.scale.wait_s)} (scale.wait_s) for more nodes") from None
            if not told:
                console.warn(f"{err}; waiting up to {duration(run.scale.wait_s)} (scale.wait_s) for more nodes")
                told = True
            time.sleep(min(1.0, run.scale.wait_s))


def check_checkpoint(
    found: CheckpointRef | None, data: PreparedData, run: config.RunConfig, run_dir: str, tokenizer: Any
) -> None:
    """Raises DataError, naming it, when a checkpoint was made from other data, tokenizer or chat template."""
    if found is not None and found.meta.get("data_hash") != data.data_hash:
        changed = what_changed(run_dir, run, data, tokenizer_hash(tokenizer), template_hash(tokenizer))
        raise DataError(
            f"{changed} since the checkpoint {found.uri} of the run '{run.name}' was made; restore what it was, or train "
            f"anew: choose another name, or delete {run_dir}"
        )


def say_plan(run: config.RunConfig, data: PreparedData, newest: CheckpointRef | None, console: Console) -> None:
    """Tells what will be trained, what an epoch is, and what becomes of the tail."""
    plan, size = data.plan, run.train.global_batch_size
    used, per_epoch = plan.num_steps * size, plan.mixture.sequences_per_epoch
    tail = round(run.train.epochs * per_epoch) - used if run.train.max_steps is None else 0
    console.say(
        f"train: {plan.num_steps} steps of {size} rows ({used / per_epoch:.2f} epochs of {per_epoch} rows"
        f"{f'; {tail} left over at the end' if tail else ''}), {run.method.type}, "
        f"{run.train.precision}, ZeRO-{run.deepspeed.zero_stage}, {run.world_sizes[0]} workers × micro-batch "
        f"{run.micro_batch_size} × {run.accumulation_steps} accumulated"
    )
    if newest is not None:
        console.say(f"train: continuing at step {newest.step} from {newest.uri}")


def _start(
    job: TrainJob, world_size: int, plan: LoadPlan, use_gpu: bool, wish: Wish, emit: Callable[[Event], None]
) -> GroupResult:
    """One group of workers, to its end."""
    run = job.run
    monitor = _monitor()
    # A node that just died counts as alive for a while; then the group can't start, and another size is tried.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_S)
    with tempfile.TemporaryDirectory(prefix="ftray-train-") as scratch:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": replace(job, monitor=monitor)},
            scaling_config=ScalingConfig(
                num_workers=world_size,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": run.scale.cpus_per_worker}
                | ({"GPU": run.scale.gpus_per_worker} if use_gpu else {}),
                accelerator_type=run.scale.accelerator,
            ),
            torch_config=GlooBackend(backend="nccl" if use_gpu else "gloo"),
            # Ray's own bookkeeping only: our checkpoints go to the run's storage, by our own hand, and so `supervise`
            # decides when to start anew, where from, and with how many.
            run_config=RunConfig(
                name=run.name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
            datasets={"train": ray.data.from_items([0])},
            dataset_config=LoaderConfig(plan),
        )
        try:
            return run_group(trainer, monitor, HangDetector(run.train.hang_timeout_s), emit, wish)
        finally:
            ray.kill(monitor)


def _monitor() -> Any:
    """A monitor on the driver's own node: it must not go away with another."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(DriverChannel).options(num_cpus=0, max_concurrency=4, scheduling_strategy=here).remote()
