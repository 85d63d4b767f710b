"""The driver's side of training: from a run file to a finished run in storage.

Everything that can be wrong is looked at here, before a worker starts: storage, identity, model, data, resources. Then
Ray Train runs `loop.train_worker`; this side shows progress and passes Ctrl-C on.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ftray import config, errors, storage
from ftray.console import Console
from ftray.data.pipeline import FeedConfig, Plan, heldout_table
from ftray.data.prepare import Data, prepare_data
from ftray.errors import ConfigError, DataError, FtrayError, Interrupted, Preempted, RunError, RunHeldError, innermost
from ftray.model.load import absolute_base, load_tokenizer, tokenizer_hash
from ftray.train.identity import versions
from ftray.train.loop import Job, train_worker
from ftray.train.monitor import Monitor
from ftray.train.timeline import Found, find_newest, merge_metrics

MAX_FAILURES = 3  # times that a crashed group of workers is started anew
POLL_S = 0.3


def train(run: config.Run, run_dir: str, console: Console, lease: storage.Lease | None = None) -> Found:
    """Trains a run to its end; returns its last checkpoint. Needs a started Ray, and the run's lease.

    Raises DataError, ConfigError before any worker starts; Interrupted after Ctrl-C with a committed checkpoint;
    Preempted after SIGTERM; RunError when workers fail more often than allowed.
    """
    use_gpu = check_resources(run)
    load = partial(load_tokenizer, absolute_base(run.model))
    data = prepare_data(run, run_dir, console, load, tokenizer_hash(load()))
    newest = find_newest(run_dir, console.warn)
    check_checkpoint(newest, data, run, run_dir)
    if newest is not None and newest.progress.finished:
        console.say(f"training is complete ({newest.step} steps); nothing to do")
        return newest
    say_plan(run, data, newest, console)
    heldout = None
    if data.heldout_stream and data.heldout_index and run.evaluate.every:
        heldout = ray.put(heldout_table(data.heldout_index, data.heldout_stream))
    monitor = ray.remote(Monitor).options(num_cpus=0, max_concurrency=4).remote()
    meta = {"config_hash": run.config_hash, "data_hash": data.data_hash, "versions": versions()}
    there = run.model_copy(update={"model": absolute_base(run.model)})
    job = Job(there, run_dir, meta, heldout, monitor)
    with tempfile.TemporaryDirectory(prefix="ftray-train-") as scratch:
        trainer = _trainer(job, data.plan, use_gpu, run, scratch)
        _fit(trainer, monitor, newest.step if newest else 0, data.plan.num_steps, console, lease)
    last = find_newest(run_dir, console.warn)
    if last is None:
        raise RunError(f"{run_dir} has no checkpoint although training ended; look at the log file")
    merge_metrics(run_dir, last.progress)
    return last


def check_checkpoint(found: Found | None, data: Data, run: config.Run, run_dir: str) -> None:
    """Raises DataError when a checkpoint was made from other data, tokenizer or template."""
    if found is not None and found.meta["data_hash"] != data.data_hash:
        raise DataError(
            f"the data, tokenizer or template of the run '{run.name}' changed since its checkpoint {found.uri} was made; "
            f"restore them, choose another name, or delete {run_dir}"
        )


def check_resources(run: config.Run) -> bool:
    """Whether workers use GPUs. Raises ConfigError when the cluster can never hold them."""
    total = ray.cluster_resources()
    num_gpus, scale = total.get("GPU", 0), run.scale
    use_gpu = scale.accelerator is not None or num_gpus > 0
    if scale.accelerator is not None and f"accelerator_type:{scale.accelerator}" not in total:
        kinds = [k.split(":")[1] for k in total if k.startswith("accelerator_type:")]
        raise ConfigError(
            f"scale.accelerator {scale.accelerator} is not in this cluster (it has {', '.join(kinds) or 'no GPU'}); correct it"
        )
    if use_gpu and num_gpus < scale.num_workers:
        raise ConfigError(
            f"scale.num_workers ({scale.num_workers}) needs as many GPUs, the cluster has {int(num_gpus)}; lower it"
        )
    needed = scale.num_workers * scale.cpus_per_worker
    if needed > total.get("CPU", 0):
        raise ConfigError(
            f"scale asks for {needed:g} CPUs (num_workers × cpus_per_worker), the cluster has {total.get('CPU', 0):g}; lower one"
        )
    return use_gpu


def say_plan(run: config.Run, data: Data, newest: Found | None, console: Console) -> None:
    """Tells what will be trained, what an epoch is, and what becomes of the tail."""
    plan, size = data.plan, run.train.global_batch_size
    used, per_epoch = plan.num_steps * size, plan.mixture.rows_per_epoch
    tail = round(run.train.epochs * per_epoch) - used if run.train.max_steps is None else 0
    console.say(
        f"train: {plan.num_steps} steps of {size} rows ({used / per_epoch:.2f} epochs of {per_epoch} rows"
        f"{f'; {tail} left over at the end' if tail else ''}), {run.method.type}, "
        f"{run.train.precision}, ZeRO-{run.deepspeed.zero_stage}, {run.scale.num_workers} workers × micro-batch "
        f"{run.micro_batch_size} × {run.accumulation_steps} accumulated"
    )
    if newest is not None:
        console.say(f"train: continuing at step {newest.step} from {newest.uri}")


def _trainer(job: Job, plan: Plan, use_gpu: bool, run: config.Run, scratch: str) -> TorchTrainer:
    resources = {"CPU": run.scale.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=run.scale.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            accelerator_type=run.scale.accelerator,
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        # Ray's own bookkeeping only: our checkpoints go to the run's storage, by our own hand.
        run_config=RunConfig(
            name=run.name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
        datasets={"train": ray.data.from_items([0])},
        dataset_config=FeedConfig(plan),
    )


def _fit(
    trainer: TorchTrainer, monitor: Any, step: int, num_steps: int, console: Console, lease: storage.Lease | None
) -> None:
    """Runs the trainer on a thread, so that this one can show progress and pass signals on."""
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as err:  # noqa: BLE001 - handed to the main thread, which waits for this one
            failure.append(err)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    last: dict[str, Any] = {}
    with _signals(monitor, console) as caught, console.progress("train: step", num_steps, step) as bar:
        while thread.is_alive():
            thread.join(POLL_S)
            for event in ray.get(monitor.drain.remote()):
                _show(event, bar, console)
                last = event
            if lease is not None and lease.lost:
                monitor.stop.remote()
    if lease is not None and lease.lost:
        raise RunHeldError("another process took the run over while this one gave no sign of life; follow that one")
    if (known := ray.get(monitor.failure.remote())) is not None:
        kind, message = known
        raise getattr(errors, kind, RunError)(message)
    if failure:
        raise RunError(_explain(failure[0])) from failure[0]
    if not last.get("finished", False):
        remedy = "run the same command again to continue"
        if caught and caught[0] == signal.SIGTERM:
            raise Preempted(f"preempted at step {last.get('step', step)}; {remedy}")
        where = f"checkpoint of step {last['step']} is committed" if last.get("step") else "no step was done"
        raise Interrupted(f"interrupted; {where}; {remedy}")


def _show(event: dict[str, Any], bar: Any, console: Console) -> None:
    if event["event"] == "step":
        skipped = " · skipped (not finite)" if event.get("skipped") else ""
        bar.update(event["step"] + 1, f"loss {event['loss']:.4f} · {event['tokens_per_s']:.0f} tokens/s{skipped}")
    elif event["event"] == "heldout":
        console.say(f"held-out loss at step {event['step']}: {event['heldout_loss']:.4f}")
    elif event["event"] == "fit":
        console.say(
            f"train: micro-batch {event['micro_batch_size']}, {event['layers']} of {event['num_layers']} layers recomputed; "
            f"{event['peak'] / 2**30:.0f} GiB expected on each GPU"
        )
    elif event["event"] == "start" and event["step"] > 0:
        console.say(f"train: workers continue at step {event['step']}")


@contextmanager
def _signals(monitor: Any, console: Console) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM asks the workers to commit and leave; a second Ctrl-C ends at once."""
    caught: list[int] = []

    def handle(number: int, _: Any) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt
        console.say("stopping after this step, committing a checkpoint (Ctrl-C again: end at once) …")
        monitor.stop.remote()

    kept = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _explain(error: BaseException) -> str:
    """What Ray Train raised, as one sentence: the innermost message."""
    failures = getattr(error, "worker_failures", None)
    inner = innermost(next(iter(failures.values())) if failures else error)
    text = str(inner) if isinstance(inner, FtrayError) else f"{type(inner).__name__}: {inner}"
    return f"training failed: {' '.join(text.split())[:500]}"
