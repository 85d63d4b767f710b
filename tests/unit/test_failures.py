"""What a run makes of failures, as far as no Ray is needed: causes in words, hanging, room for workers, ranges of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError

from ftray import config
from ftray.console import Console
from ftray.driver.resources import max_workers, world_size_for
from ftray.driver.supervisor import WorkerSupply, store_lost
from ftray.driver.worker_group import OTHER_PHASES_S, HangDetector
from ftray.errors import ConfigError, RunError
from ftray.events.types import CheckpointStarted, PhaseStarted, TrainingStarted
from ftray.train.checkpoint.catalog import list_checkpoints
from ftray.train.failures import explain, out_of_memory
from tests.events import step_finished


class Hand:
    """A clock's hand that a test moves."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def test_a_missing_step_counts_and_loading_compiling_saving_and_evaluating_do_not() -> None:
    hand = Hand()
    clock = HangDetector(10.0, hand)
    hand.s += 1000  # loading
    assert clock.problem == ""
    clock.note(TrainingStarted(0))
    hand.s += 1000  # compiling the first step
    assert clock.problem == ""
    clock.note(step_finished(0))
    hand.s += 9
    assert clock.problem == ""
    clock.note(PhaseStarted("saving"))
    hand.s += 1000  # saving, evaluating
    assert clock.problem == ""
    clock.note(CheckpointStarted(1))
    hand.s += 11
    assert clock.problem == "no step for 11 s (train.hang_timeout_s: 10)"
    clock.note(step_finished(0))
    assert clock.problem == ""


def test_a_store_that_is_gone_while_a_run_trains_is_no_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "0.1")
    with pytest.raises(RunError) as caught, store_lost():
        list_checkpoints("s3://data/runs/one")
    assert caught.value.exit_code == 1
    assert "can't be reached" in str(caught.value)
    assert str(caught.value).endswith("All committed checkpoints are intact; run the same command again to continue")


def test_even_what_does_not_count_ends_some_day() -> None:
    hand = Hand()
    clock = HangDetector(10.0, hand)
    hand.s += OTHER_PHASES_S + 1
    assert "no event for 3601 s" in clock.problem


def test_the_worker_that_died_is_named_and_not_those_that_lost_it() -> None:
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    died = ActorDiedError()
    assert explain(WorkerGroupError("", {0: lost, 1: died})) == (
        "the worker of rank 1 died without an error: its process was killed (by the kernel, out of memory, or by a user), "
        "or its node is gone"
    )
    assert explain(WorkerGroupError("", {0: lost, 1: KeyError("x")})) == "rank 1: KeyError: 'x'"
    assert "Connection closed" in explain(WorkerGroupError("", {0: lost}))
    assert explain(ControllerError(ValueError("no"))) == "ValueError: no"


def test_a_worker_that_ray_ended_for_memory_is_told_with_its_machine() -> None:
    ended = OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 31f6) "
        "was 22.74GB used / 23.54GB limit (0.966)"
    )
    assert explain(WorkerGroupError("", {0: RuntimeError("Connection closed by peer"), 1: ended})) == (
        "the worker of rank 1 was killed because its machine 192.0.2.2 ran low on memory; lower train.micro_batch_size or "
        "data.max_seq_len, or use machines with more memory"
    )
    assert out_of_memory(ended) is None, "another's end, of which trying again may make more"


def test_a_disk_that_is_full_under_ray_is_told() -> None:
    full = RuntimeError("Failed to spill: [Errno 28] No space left on device")
    assert "a disk of the cluster is full" in explain(WorkerGroupError("", {0: full}))


def test_too_little_memory_for_a_step_is_told_with_its_remedy() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    sentence = out_of_memory(caught.value)
    assert sentence is not None
    assert sentence.startswith("the machine has not enough memory for a step")
    assert "lower train.micro_batch_size" in sentence
    gpu = out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert gpu is not None
    assert gpu.startswith("the GPU has not enough memory")
    assert out_of_memory(RuntimeError("anything else")) is None


def run_of(workers: object, rows: int = 12, micro: object = "auto", **scale: Any) -> config.RunConfig:
    tree = {
        "name": "a",
        "model": {"base": "b"},
        "data": {"train": [{"path": "p"}]},
        "train": {"global_batch_size": rows, "micro_batch_size": micro},
        "scale": {"num_workers": workers, **scale},
    }
    return config.parse_run(tree, "f")


def test_a_range_of_workers_takes_the_largest_number_that_divides_the_batch_and_has_room() -> None:
    run = run_of({"min": 2, "max": 7})
    assert run.world_sizes == [6, 4, 3, 2]
    assert run_of({"min": 2, "max": 7}, micro=2).world_sizes == [6, 3, 2]
    assert [world_size_for(run, room) for room in (9, 6, 5, 3, 2, 1)] == [6, 6, 4, 3, 2, None]
    assert run.config_hash == run_of(2).config_hash, "the number of workers is no part of a run's identity"


def test_a_range_that_divides_nothing_or_runs_backwards_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"global_batch_size \(12\) can be divided by no number of workers from 7 to 11"
    ):
        run_of({"min": 7, "max": 11})
    with pytest.raises(ConfigError, match=r"scale\.num_workers: max \(1\) is below min \(2\)"):
        run_of({"min": 2, "max": 1})


def test_each_worker_fits_on_one_node_and_a_cpu_is_left_for_data() -> None:
    two = run_of(1, cpus_per_worker=2).scale
    assert max_workers(two, False, [{"CPU": 3}, {"CPU": 3}]) == 2  # not three: no node has the third's two
    assert max_workers(two, False, [{"CPU": 2}, {"CPU": 2}]) == 1  # two would leave no CPU to read data
    assert max_workers(two, False, [{"CPU": 2}, {"CPU": 2}, {"CPU": 1}]) == 2
    assert max_workers(two, True, [{"CPU": 64, "GPU": 8}, {"CPU": 64}]) == 8
    named = run_of(1, accelerator="A100").scale
    nodes = [{"CPU": 64, "GPU": 8, "accelerator_type:A100": 1}, {"CPU": 64, "GPU": 8, "accelerator_type:H100": 1}]
    assert max_workers(named, True, nodes) == 8


def test_a_group_grows_only_into_room_of_the_right_kind_on_one_node_each_and_not_again_at_once() -> None:
    run = run_of({"min": 1, "max": 2}, accelerator="A100")
    group = WorkerSupply(run, True, Console(), [], None)
    group._size = 1
    a100, t4 = ({"CPU": 8.0, "GPU": 1.0, f"accelerator_type:{kind}": 1.0} for kind in ("A100", "T4"))
    held = {"CPU": 1.0, "accelerator_type:A100": 1.0}
    assert group.growth([a100, a100, t4], [held, a100, t4]) == 2
    assert group.growth([a100, a100, t4], [held, held, t4]) is None, "another's GPU, and one of another kind"
    halves = WorkerSupply(run_of({"min": 1, "max": 2}, cpus_per_worker=2), False, Console(), [], None)
    halves._size = 1
    assert halves.growth([{"CPU": 3.0}, {"CPU": 3.0}], [{"CPU": 1.0}, {"CPU": 1.0}]) is None, "no node has two free"
    assert halves.growth([{"CPU": 3.0}, {"CPU": 3.0}], [{"CPU": 1.0}, {"CPU": 3.0}]) == 2
    halves._not_before[2] = float("inf")
    assert halves.growth([{"CPU": 3.0}, {"CPU": 3.0}], [{"CPU": 1.0}, {"CPU": 3.0}]) is None, "it was given no room"
