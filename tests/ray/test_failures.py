"""What comes over a run while it trains, on a cluster of two nodes: it goes on, or ends with one sentence and loses nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster as Nodes
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from ftray import config, storage
from ftray.console import Console
from ftray.driver.launch import train
from ftray.driver.run_record import open_run, parent_of
from ftray.driver.supervisor import StopReason, WorkerSupply, supervise
from ftray.driver.worker_group import GroupResult
from ftray.errors import ConfigError, Interrupted, Preempted, RunError
from ftray.model.lora import build_model, trainable
from ftray.train.checkpoint.catalog import RunProgress, list_checkpoints, merge_metrics
from ftray.train.checkpoint.restore import open_parent, parent_parts
from ftray.train.checkpoint.tensors import TensorPart
from ftray.train.checkpoint.writer import CheckpointWriter, load_checkpoint
from tests import cluster, tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {"model": tiny.write_tiny_model(root / "model"), "data": tiny.write_records(root / "data", 60)}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head with 3 CPUs and a node with 2."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    found.add_node(num_cpus=2)
    ray.init(address=found.address, log_to_driver=False, logging_level="error")
    yield found
    ray.shutdown()
    found.shutdown()


def run_of(parts: dict[str, Path], directory: Path, **overrides: Any) -> config.RunConfig:
    return cluster.make_run(directory, parts["model"], parts["data"], **overrides)


def workers() -> list[psutil.Process]:
    return cluster.processes_of("RayTrainWorker")


@pytest.fixture(scope="module")
def stood_still(nodes: Nodes, parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run of 60 steps one of whose workers was stopped early: its directory, and what the user saw."""
    root = tmp_path_factory.mktemp("stood-still")
    stop = lambda: workers()[0].send_signal(signal.SIGSTOP)  # noqa: E731
    run = run_of(parts, root, train__hang_timeout_s=8, train__max_steps=60)
    _, text = cluster.run_training(run, "step 3/60", stop)
    return str(root / "tiny"), text


def test_a_worker_that_stands_still_is_noticed_and_no_step_is_lost_or_repeated(stood_still: tuple[str, str]) -> None:
    run_dir, text = stood_still
    assert list_checkpoints(run_dir)[0].progress.finished
    assert "(train.hang_timeout_s: 8); its workers were killed; restarting from step" in text
    assert sorted(cluster.losses(run_dir)) == list(range(60))


def test_a_disk_that_fills_up_ends_the_run_with_its_path_and_the_last_checkpoint_is_kept(
    nodes: Nodes, parts: dict[str, Path], tmp_path: Path
) -> None:
    def no_more_space() -> None:
        for worker in workers():
            worker.rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))  # what a quota does

    run = run_of(parts, tmp_path, train__max_steps=200, checkpoint__every=20, method__type="full")
    with pytest.raises(RunError) as caught:
        cluster.run_training(run, "step 25/200", no_more_space)
    step = list_checkpoints(str(tmp_path / "tiny"))[0].step
    assert 20 <= step < 200
    assert re.search(rf"step-{step + 20:06d}/\S+ can't be written: no space is left", str(caught.value))
    assert str(caught.value).endswith(
        f"The checkpoint of step {step} is intact; run the same command again to continue"
    )
    assert caught.value.exit_code == 1


def scripted(nodes: Nodes, run: config.RunConfig, act: Callable[[int], GroupResult]) -> tuple[int, RunError]:
    """Supervises groups that end as `act` says, without any worker; how many were started, and the error at the end."""
    run_dir, started = open_run(run), 0

    def start(size: int, stop_reason: StopReason) -> GroupResult:
        nonlocal started
        started += 1
        return act(started)

    with pytest.raises(RunError) as caught:
        supervise(run, run_dir, False, start, Console(cluster.Watched()), None)
    return started, caught.value


def test_failures_in_a_row_end_a_run_and_a_checkpoint_between_them_renews_the_budget(
    nodes: Nodes, parts: dict[str, Path], tmp_path: Path
) -> None:
    run = run_of(parts, tmp_path / "a", scale__max_failures=1)
    started, error = scripted(nodes, run, lambda _: GroupResult(False, failure="it broke"))
    assert started == 2
    assert str(error) == (
        "training failed 2 times in a row without a new checkpoint (scale.max_failures: 1): it broke. There is no "
        "checkpoint yet; run the same command again to continue"
    )

    run = run_of(parts, tmp_path / "b", scale__max_failures=1)
    writer = CheckpointWriter(str(tmp_path / "b/tiny"), 2, {}, whole=True)

    def moves_on(number: int) -> GroupResult:
        if number <= 6:
            writer.save(RunProgress(step=number), [TensorPart("weights.a", (1,), 0, torch.ones(1))], [])
            writer.wait()
        return GroupResult(False, failure="it broke")

    assert scripted(nodes, run, moves_on)[0] == 7, "the seventh failure is the second in a row at step 6"


def test_a_run_that_lost_its_room_waits_and_says_for_what(nodes: Nodes, parts: dict[str, Path], tmp_path: Path) -> None:
    run = run_of(parts, tmp_path, scale__num_workers=6, train__global_batch_size=6, scale__wait_s=1)
    stream = cluster.Watched()
    with pytest.raises(
        Preempted,
        match=r"for 1 s, the cluster has room for 4 workers, but the run needs at least 6 .*\. There is no checkpoint yet",
    ):
        WorkerSupply(run, False, Console(stream), [], None).wait_for_resources(str(tmp_path), 6)
    assert "waiting up to 1 s (scale.wait_s) for nodes" in stream.getvalue()


def with_checkpoint(run: config.RunConfig) -> str:
    """The directory of a run that was begun."""
    run_dir = open_run(run)
    writer = CheckpointWriter(run_dir, 2, {}, whole=True)
    writer.save(RunProgress(step=1), [TensorPart("weights.a", (1,), 0, torch.ones(1))], [])
    writer.wait()
    return run_dir


def test_a_run_that_is_continued_on_a_cluster_too_small_waits_and_is_to_be_run_again(
    nodes: Nodes, parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    six = {"scale__num_workers": 6, "train__global_batch_size": 6, "scale__wait_s": 1}
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    with pytest.raises(ConfigError, match="scale needs 6 CPUs"):  # one that is new is refused at once
        cluster.run_training(run_of(parts, tmp_path / "new", **six))

    run = run_of(parts, tmp_path / "begun", **six)
    stream = cluster.Watched()
    run_dir = with_checkpoint(run)
    with pytest.raises(Preempted) as caught:
        train(run, run_dir, Console(stream))
    lacks = "scale needs 6 CPUs (num_workers × cpus_per_worker), the cluster has 5; lower one of them"
    assert str(caught.value) == f"{lacks}; waited 1 s (scale.wait_s) for more nodes"
    assert caught.value.exit_code == 75
    assert stream.getvalue().count("waiting up to 1 s (scale.wait_s) for more nodes") == 1

    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match="scale needs 6 CPUs"):  # a Ray of one's own gets no more nodes
        train(run, run_dir, Console(stream))


def test_a_new_run_starts_from_old_weights_and_from_nothing_else_of_them(
    parts: dict[str, Path], stood_still: tuple[str, str], tmp_path: Path
) -> None:
    parent = open_parent(stood_still[0])
    assert parent.step == 60
    still: dict[str, Any] = {"train__learning_rate": 1e-30, "train__max_steps": 1}
    run = run_of(parts, tmp_path, **still)
    found, _ = cluster.run_training(run, parent=parent.uri)
    assert (found.step, parent_of(str(tmp_path / "tiny"))) == (1, parent.uri)
    old, new = load_checkpoint(parent), load_checkpoint(found)
    for name in (name for name in old if name.startswith("weights.")):
        assert torch.equal(old[name], new[name]), "nothing was to change at this learning rate"
    assert any(not torch.equal(old[n], new[n]) for n in old if n.startswith("exp_avg.")), "the optimizer began anew"
    with pytest.raises(ConfigError, match=r"was started from .*step-000060; remove --from"):
        open_run(run, f"{stood_still[0]}/checkpoints/step-000008")
    wider = trainable(build_model(run.model, run_of(parts, tmp_path, method__rank=8).method, "fp32", 0))
    with pytest.raises(RunError, match=r"is \[4, \d+\] there and \[8, \d+\] here; model and method must be the same"):
        parent_parts(parent.uri, wider)


@pytest.mark.long
def test_weights_that_went_bad_are_those_of_a_checkpoint_before_and_training_goes_on(
    nodes: Nodes, parts: dict[str, Path], tmp_path: Path
) -> None:
    run = run_of(parts, tmp_path, train__max_steps=8, train__rewind_after=2, checkpoint__every=2)
    cluster.run_training(run)
    run_dir = str(tmp_path / "tiny")
    for found in list_checkpoints(run_dir):
        tensors = load_checkpoint(found)
        if found.step >= 4:
            storage.delete_tree(found.uri)
        if found.step == 4:
            bad = [TensorPart(name, tuple(t.shape), 0, t.flatten() * float("nan")) for name, t in tensors.items()]
            progress, writer = found.progress, CheckpointWriter(run_dir, 9, found.meta, whole=True)
            writer.save(progress, bad, [])
            writer.wait()
    found, text = cluster.run_training(run)
    assert "weights and optimizer are restored from step 2; training continues at step 6" in text
    assert found.progress.finished
    assert (found.progress.num_bad_steps, found.progress.num_updates) == (2, 4)
    told = cluster.losses(run_dir)
    assert [step for step, loss in told.items() if loss is None] == [4, 5]


@pytest.mark.long
def test_workers_become_fewer_and_more_with_the_nodes_and_every_step_is_done_once(
    nodes: Nodes, parts: dict[str, Path], tmp_path: Path
) -> None:
    """The last test of its module: it takes the nodes apart."""
    second = next(iter(nodes.worker_nodes))
    started: list[subprocess.Popen[bytes]] = []

    def lose_a_node() -> None:
        nodes.remove_node(second, allow_graceful=False)

    def start_a_node() -> None:  # as on another machine; Cluster.add_node wants the main thread
        ray_command = str(Path(sys.executable).with_name("ray"))
        arguments = [ray_command, "start", f"--address={nodes.address}", "--num-cpus=2", "--block"]
        started.append(subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def give_notice() -> None:
        node = next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU") == 2)
        reason, deadline_ms = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int(time.time() * 1000) + 3_600_000
        ray._raylet.GcsClient(address=nodes.address).drain_node(node, reason, "spot", deadline_ms)

    stream = cluster.Watched(
        ("step 5/4000", lose_a_node),
        ("continuing with 1 workers instead of 2", start_a_node),
        ("continuing with 2 workers instead of 1", lambda: None),
        ("train: step ", give_notice),  # the larger group is at work
        ("continuing with 1 workers instead of 2", lambda: None),
        ("train: step ", cluster.press_ctrl_c),
    )
    run = run_of(
        parts,
        tmp_path,
        train__max_steps=4000,
        checkpoint__every=50,
        scale__num_workers={"min": 1, "max": 2},
        scale__cpus_per_worker=1.6,  # one on each node; one thread each
    )
    try:
        with pytest.raises(Interrupted):
            cluster.run_training(run, stream)
    finally:
        for process in started:
            process.terminate()
            process.wait()
    text = stream.getvalue()
    assert re.search(r"stopped the workers at step \d+: the cluster has room for 2 workers", text)
    assert re.search(r"stopped the workers at step \d+: the node .* will be taken away", text)
    newest = list_checkpoints(str(tmp_path / "tiny"))[0]
    merge_metrics(str(tmp_path / "tiny"), newest.progress)
    assert sorted(cluster.losses(str(tmp_path / "tiny"))) == list(range(newest.step))
