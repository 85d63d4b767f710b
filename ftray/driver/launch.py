"""The driver's side of training: from a run file to a finished run in storage.

Everything is checked here before a worker starts: storage, run record, model, data, resources. Then Ray Train runs
`worker.train_worker`, one worker group after another (`supervisor`), while this side follows their events.
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
from ftray.data.order import tail_of
from ftray.data.prepare import PreparedData, prepare_data
from ftray.driver.lineage import record_lineage, what_changed
from ftray.driver.resources import check_resources
from ftray.driver.run_record import parent_of, versions
from ftray.driver.supervisor import StopReason, store_lost, supervise
from ftray.driver.worker_group import GlooBackend, GroupResult, HangDetector, run_group
from ftray.errors import ConfigError, DataError, Interrupted, Preempted, RunError, RunHeldError, StorageError
from ftray.events.alerts import AlertMonitor
from ftray.events.bus import ConsoleSubscriber, EventBus, Subscriber
from ftray.events.event_log import EventLog
from ftray.events.trackers import follow_run
from ftray.events.types import CheckpointStarted, Event, GroupFailed
from ftray.model.load import absolute_base, load_tokenizer, template_hash, tokenizer_hash
from ftray.train.checkpoint.catalog import (
    CheckpointRef,
    find_newest,
    list_checkpoints,
    merge_metrics,
    read_metrics,
    read_segments,
)
from ftray.train.driver_channel import DriverChannel, TrainJob
from ftray.train.failures import explain
from ftray.train.worker import train_worker

PLACEMENT_TIMEOUT_S = "20"  # of a worker group, for Ray Train
METRICS_FOR_ALERTS = 50  # segments of earlier metrics that alerts continue from


@dataclass(frozen=True)
class TrialHooks:
    """Hooks for a sweep that runs this training job as one of its trials.

    Attributes:
        subscriber: Follows the trial. After an eval the workers wait until its handlers return.
        caught: Signals; the run stops as if it had received them.
        data: Data that the trials share; None if the run prepares its own.
        eval_table: Reference to the table of eval sequences that the trials share.
    """

    subscriber: Subscriber
    caught: list[int]
    data: PreparedData | None = None
    eval_table: Any = None


def train(
    run: config.RunConfig,
    run_dir: str,
    console: Console,
    lease: storage.Lease | None = None,
    hooks: TrialHooks | None = None,
    subscribers: Sequence[Subscriber] = (),
) -> CheckpointRef:
    """Trains a run to its end. Needs a started Ray, and the run's lease.

    Args:
        run: The run's configuration.
        run_dir: The run's directory.
        console: Shows progress.
        lease: The right to write the run.
        hooks: Of the sweep that the run is a trial of.
        subscribers: Follow the run's events.

    Returns:
        The last checkpoint.

    Raises:
        DataError, ConfigError: Before any worker starts.
        Interrupted: After Ctrl-C, with a committed checkpoint.
        Preempted: After SIGTERM, with a committed checkpoint.
        RunError: Workers failed more often than allowed.
    """
    use_gpu = _wait_for_resources(run, run_dir, console)
    data = hooks.data if hooks else None
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
    print_plan(run, data, newest, console)
    job = _job(run, run_dir, data, tokenizer, lease, hooks)
    _run_groups(job, data.plan, newest.step if newest else 0, use_gpu, console, lease, hooks, subscribers)
    return _last_checkpoint(run_dir, console)


def _run_groups(
    job: TrainJob,
    plan: LoadPlan,
    step: int,
    use_gpu: bool,
    console: Console,
    lease: storage.Lease | None,
    hooks: TrialHooks | None,
    subscribers: Sequence[Subscriber],
) -> None:
    """Connects everything that follows the run to one bus, and runs worker groups to the end of training."""
    run, run_dir = job.run, job.run_dir

    def is_ours() -> bool:
        return lease is None or not lease.overtaken

    log = EventLog(run_dir, is_ours)
    alerts = AlertMonitor(run, plan.num_steps, _metrics_before(run_dir, console))
    with (
        log.session(step),
        follow_run(run, run_dir, read_segments, console.warn, is_ours) as checkpoint_started,
        console.progress("train: step", plan.num_steps, step) as bar,
    ):
        bus = EventBus()
        ConsoleSubscriber(console, bar).subscribe(bus)
        log.subscribe(bus)
        bus.subscribe(CheckpointStarted, lambda _: checkpoint_started())
        alerts.subscribe(bus, console.warn)
        for subscriber in (*subscribers, *([hooks.subscriber] if hooks else [])):
            subscriber.subscribe(bus)

        def start(world_size: int, stop_reason: StopReason) -> GroupResult:
            try:
                result = _start_group(job, world_size, plan, use_gpu, stop_reason, bus.emit)
            except RayError as err:
                log.write(GroupFailed(explain(err)))
                raise
            log.group_ended(result.event_type, result.why)
            return result

        try:
            with store_lost():
                supervise(run, run_dir, use_gpu, start, console, lease, hooks.caught if hooks else None)
        except (Interrupted, Preempted, RunError):
            with suppress(StorageError):
                if committed := list_checkpoints(run_dir):
                    merge_metrics(run_dir, committed[0].progress)
            raise


def _last_checkpoint(run_dir: str, console: Console) -> CheckpointRef:
    """The checkpoint that training ended with. Raises RunError without one."""
    with store_lost():
        last = find_newest(run_dir, console.warn)
        if last is None:
            raise RunError(f"training ended, but {run_dir} has no checkpoint; check the log file")
        merge_metrics(run_dir, last.progress, console.warn)
    return last


def _metrics_before(run_dir: str, console: Console) -> list[dict[str, Any]]:
    """Metrics that alerts continue from: the first and the newest segments."""
    try:
        return read_metrics(run_dir, most=METRICS_FOR_ALERTS, warn=console.warn)
    except StorageError as err:
        console.warn(f"alerts start without earlier metrics, which cannot be read: {err}")
        return []


def _job(
    run: config.RunConfig,
    run_dir: str,
    data: PreparedData,
    tokenizer: Any,
    lease: storage.Lease | None,
    hooks: TrialHooks | None,
) -> TrainJob:
    """The job for the workers; records its lineage in the run. Raises RunHeldError."""
    eval_ref = hooks.eval_table if hooks else None
    if eval_ref is None and data.eval_stream and data.eval_index and run.evaluate.every:
        eval_ref = ray.put(eval_table(data.eval_index, data.eval_stream))
    if lease is not None and not storage.holds(lease.token):
        raise RunHeldError(
            "another process took over the run because this one did not renew its lease; watch that process instead"
        )
    parent = parent_of(run_dir)
    lineage = record_lineage(run, run_dir, data, tokenizer_hash(tokenizer), template_hash(tokenizer), parent)
    hashes = {"config_hash": run.config_hash, "data_hash": data.data_hash, "lineage": lineage}
    return TrainJob(
        run=run.model_copy(update={"model": absolute_base(run.model)}),
        run_dir=run_dir,
        meta={**hashes, "versions": versions()},
        eval_table=eval_ref,
        channel=None,
        parent=parent,
        lease=lease.token if lease is not None else None,
        waits=hooks is not None,
    )


def _wait_for_resources(run: config.RunConfig, run_dir: str, console: Console) -> bool:
    """`check_resources`; on a cluster, a run with a checkpoint waits up to `scale.wait_s` for nodes to come back.

    A Ray that this command started itself never gets more nodes.
    """
    end_s, has_warned = time.monotonic() + run.scale.wait_s, False
    while True:
        try:
            return check_resources(run)
        except ConfigError as err:
            if os.environ.get("RAY_ADDRESS", "local") in ("", "local") or not list_checkpoints(run_dir):
                raise
            if time.monotonic() > end_s:
                raise Preempted(f"{err}; waited {duration(run.scale.wait_s)} (scale.wait_s) for more nodes") from None
            if not has_warned:
                console.warn(f"{err}; waiting up to {duration(run.scale.wait_s)} (scale.wait_s) for more nodes")
                has_warned = True
            time.sleep(min(1.0, run.scale.wait_s))


def check_checkpoint(
    checkpoint: CheckpointRef | None, data: PreparedData, run: config.RunConfig, run_dir: str, tokenizer: Any
) -> None:
    """Raises DataError if a checkpoint was made from other data, another tokenizer or another chat template."""
    if checkpoint is not None and checkpoint.meta.get("data_hash") != data.data_hash:
        changed = what_changed(run_dir, run, data, tokenizer_hash(tokenizer), template_hash(tokenizer))
        raise DataError(
            f"{changed} after the checkpoint {checkpoint.uri} of the run '{run.name}' was made. Restore the former state; to "
            f"train again, choose another name or delete {run_dir}"
        )


def print_plan(run: config.RunConfig, data: PreparedData, newest: CheckpointRef | None, console: Console) -> None:
    """Prints what will be trained: steps, epochs, the remaining tail, and the parallelism."""
    plan, size = data.plan, run.train.global_batch_size
    used, per_epoch = plan.num_steps * size, plan.mixture.sequences_per_epoch
    tail = tail_of(run.train.epochs, per_epoch, size) if run.train.max_steps is None else 0
    console.say(
        f"train: {plan.num_steps} steps of {size} packed sequences ({used / per_epoch:.2f} epochs of {per_epoch} sequences"
        f"{f'; {tail} left over at the end' if tail else ''}), {run.method.type}, "
        f"learning rate {run.train.learning_rate:g}, {run.train.precision}, ZeRO-{run.deepspeed.zero_stage}, "
        f"{run.world_sizes[0]} workers × micro-batch {run.micro_batch_size} × {run.accumulation_steps} accumulated"
    )
    if newest is not None:
        console.say(f"train: continuing at step {newest.step} from {newest.uri}")


def _start_group(
    job: TrainJob,
    world_size: int,
    plan: LoadPlan,
    use_gpu: bool,
    stop_reason: StopReason,
    emit: Callable[[Event], None],
) -> GroupResult:
    """Runs one worker group to its end."""
    run = job.run
    channel = _start_channel()
    # A node that just died counts as alive for a while; then the group cannot start, and another size is tried.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", PLACEMENT_TIMEOUT_S)
    with tempfile.TemporaryDirectory(prefix="ftray-train-") as scratch:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": replace(job, channel=channel)},
            scaling_config=ScalingConfig(
                num_workers=world_size,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": run.scale.cpus_per_worker}
                | ({"GPU": run.scale.gpus_per_worker} if use_gpu else {}),
                accelerator_type=run.scale.accelerator,
            ),
            torch_config=GlooBackend(backend="nccl" if use_gpu else "gloo"),
            # For Ray's own files only: ftray's checkpoints go to the run's storage, and `supervisor` decides when workers are
            # restarted, from where and how many.
            run_config=RunConfig(
                name=run.name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
            datasets={"train": ray.data.from_items([0])},
            dataset_config=LoaderConfig(plan),
        )
        try:
            return run_group(trainer, channel, HangDetector(run.train.hang_timeout_s), emit, stop_reason)
        finally:
            ray.kill(channel)


def _start_channel() -> Any:
    """A channel on the driver's own node: it must not go away with another."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(DriverChannel).options(num_cpus=0, max_concurrency=4, scheduling_strategy=here).remote()
