"""A run continues as if nothing had happened: losses and weights are bit-identical to the uninterrupted run's (P2)."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ftray import console, storage
from ftray.cli import main, serve, session
from ftray.data.loader import BatchCoordinator
from ftray.errors import ConfigError, DataError, Interrupted
from ftray.evaluate.run import compare
from ftray.events.event_log import read_events
from ftray.events.types import AlertRaised, GroupFailed
from ftray.report.plan import START_S
from ftray.report.ray_metrics import TrainingMetrics
from ftray.report.reproduce import check_before
from ftray.train.checkpoint.catalog import CheckpointRef, list_checkpoints, read_metrics
from ftray.train.checkpoint.restore import load_tuned
from ftray.train.checkpoint.tensors import TensorPart
from ftray.train.checkpoint.writer import CheckpointWriter, load_checkpoint
from ftray.train.export import export
from tests import cluster, tiny
from tests.s3 import FaultyProxy, S3Server


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("parts")
    found = {
        "model": tiny.write_tiny_model(root / "model"),
        "data": tiny.write_records(root / "data", 60),
        "heldout": tiny.write_records(root / "heldout", 16, seed=1),
    }
    with cluster.local_ray():
        yield found


def run_of(parts: dict[str, Path], directory: Path, **overrides: Any) -> Any:
    return cluster.make_run(directory, parts["model"], parts["data"], **overrides)


def alerts_of(run_dir: str) -> list[str]:
    """Kinds of the alerts in a run's event log."""
    return [each.event.kind for each in read_events(run_dir) if isinstance(each.event, AlertRaised)]


@pytest.mark.parametrize(
    ("method", "stage", "optimizer"),
    [
        ("lora", 2, "adamw"),
        pytest.param("full", 3, "adamw", marks=pytest.mark.long),
        pytest.param("full", 0, "adamw-8bit", marks=pytest.mark.long),
    ],
)
def test_interrupted_and_killed_runs_end_bit_identical(
    parts: dict[str, Path], tmp_path: Path, method: str, stage: int, optimizer: str
) -> None:
    settings: dict[str, Any] = {
        "method__type": method,
        "deepspeed__zero_stage": stage,
        "train__optimizer": optimizer,
        # Steps long enough, and enough of them, that what is done at the third comes before the last.
        "train__max_steps": 24,
        "train__global_batch_size": 16,
    }
    smooth, _ = cluster.run_training(run_of(parts, tmp_path / "smooth", **settings))
    expected = cluster.losses(str(tmp_path / "smooth/tiny"))
    assert sorted(expected) == list(range(24))
    assert expected[23] < 0.9 * expected[0], "the model must learn, or equal losses prove nothing"

    rough, stopped_at = run_of(parts, tmp_path / "rough", **settings), 3
    if method == "lora":  # once is enough: what a stop does is the same for all
        with pytest.raises(Interrupted, match="checkpoint of step"):
            cluster.run_training(rough, "step 3/24", cluster.press_ctrl_c)
        stopped_at = list_checkpoints(str(tmp_path / "rough/tiny"))[0].step
        assert 3 <= stopped_at < 24
        told = sorted(cluster.losses(str(tmp_path / "rough/tiny")))
        assert told == list(range(stopped_at)), "metrics of a stopped run"
    found, text = cluster.run_training(rough, f"step {stopped_at + 1}/24", cluster.kill_a_worker)
    assert (f"continuing at step {stopped_at}" in text) == (method == "lora")
    killed = r"the worker of rank \d died without an error: its process was killed \(by the kernel, out of memory, or by a user\)"
    assert re.search(rf"{killed}.*; restarting from step \d+ \(failure 1 of at most \d+ in a row\)", text)
    assert found.progress.finished
    assert cluster.losses(str(tmp_path / "rough/tiny")) == expected
    assert cluster.weights_hash(found) == cluster.weights_hash(smooth)
    (failed,) = [e.event for e in read_events(str(tmp_path / "rough/tiny")) if isinstance(e.event, GroupFailed)]
    assert stopped_at < (failed.step or 0) <= 24
    for name in ("smooth", "rough"):
        told = set(alerts_of(str(tmp_path / name / "tiny")))
        assert told <= {"straggler"}, "nothing is wrong, but on a busy machine one worker may get less of it"


@pytest.mark.long
def test_other_world_sizes_see_the_same_rows_and_losses(parts: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method__dropout": 0.1, "deepspeed__zero_stage": 1, "train__max_steps": 6}
    cluster.run_training(run_of(parts, tmp_path / "two", **settings))
    cluster.run_training(run_of(parts, tmp_path / "one", scale__num_workers=1, **settings))
    two, one = cluster.losses(str(tmp_path / "two/tiny")), cluster.losses(str(tmp_path / "one/tiny"))
    assert one == pytest.approx(two, rel=1e-5)


def recorded_as(found: CheckpointRef, run_dir: str, micro_batch_size: int) -> None:
    """Makes a checkpoint the newest, and its run one that was begun on other cards, where so many rows went at once."""
    tensors, progress = load_checkpoint(found), found.progress
    for other in list_checkpoints(run_dir):
        if other.step >= found.step:
            storage.delete_tree(other.uri)
    progress.micro_batch_size = micro_batch_size
    writer = CheckpointWriter(run_dir, 9, found.meta, whole=True)
    writer.save(progress, [TensorPart(name, tuple(t.shape), 0, t.flatten()) for name, t in tensors.items()], [])
    writer.wait()


@pytest.mark.long
def test_a_run_keeps_the_micro_batch_that_it_was_begun_with_or_says_that_it_can_not(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"train__max_steps": 4, "checkpoint__every": 2, "method__dropout": 0.3}
    run, run_dir = run_of(parts, tmp_path / "auto", **settings), str(tmp_path / "auto/tiny")
    found, text = cluster.run_training(run)  # two rows for each of two workers, one at a time
    assert found.progress.micro_batch_size == 1
    assert "the run started with a micro-batch" not in text
    first = cluster.losses(run_dir)
    (middle,) = [one for one in list_checkpoints(run_dir) if one.step == 2]
    recorded_as(middle, run_dir, 2)
    found, text = cluster.run_training(run)
    assert found.progress.micro_batch_size == 2
    assert "the run started with a micro-batch" not in text
    again = cluster.losses(run_dir)
    assert [again[step] for step in (0, 1)] == [first[step] for step in (0, 1)]
    assert again[2] != first[2], "dropout falls on other places"

    (middle,) = [one for one in list_checkpoints(run_dir) if one.step == 2]
    recorded_as(middle, run_dir, 3)
    found, text = cluster.run_training(run)
    assert found.progress.micro_batch_size == 1
    assert "a micro-batch of 3 packed sequences, which does not fit these workers; it continues with 1" in text
    assert cluster.losses(run_dir) == first


@pytest.mark.long
def test_eval_loss_steers_early_stopping_and_the_best_checkpoint_stays(parts: dict[str, Path], tmp_path: Path) -> None:
    run = run_of(
        parts,
        tmp_path,
        data__eval=[{"path": str(parts["heldout"])}],
        train__learning_rate=1e-30,  # nothing changes: the first loss stays the best
        train__schedule="constant",
        evaluate__every=1,
        evaluate__early_stopping=2,
        checkpoint__keep=1,
    )
    began_s = time.time()
    found, text = cluster.run_training(run, subscribers=[TrainingMetrics(run)])
    assert found.progress.finished
    assert found.progress.best is not None
    best = int(found.progress.best["step"])
    assert found.step == best + 2 < 12
    assert {f.step for f in list_checkpoints(str(tmp_path / "tiny"))} == {best, found.step}
    assert text.count("eval loss at step") == found.step

    def is_complete(metrics: dict[str, float]) -> bool:
        names = {"loss", "eval_loss", "goodput", "workers", "restarts", "planned_steps", "tokens_per_second"}
        return metrics.get("step") == metrics.get("checkpoint_step") == found.step and names <= metrics.keys()

    shown = cluster.wait_for_metrics("ray_ftray_", "run=tiny", is_complete)
    *_, last = read_metrics(str(tmp_path / "tiny"))
    assert shown["loss"] == pytest.approx(last["loss"])
    assert shown["eval_loss"] == pytest.approx(last["eval_loss"])
    assert 0 < shown["goodput"] < 1
    assert [shown[name] for name in ("workers", "restarts", "planned_steps")] == [2, 0, 12]
    assert shown["tokens_per_second"] == pytest.approx(last["tokens_per_s"])
    padded = last["tokens_per_s"] * 4 * 128 / last["num_tokens"]
    assert shown["padded_tokens_per_second"] == pytest.approx(padded)
    assert began_s < shown["checkpoint_unix_seconds"] < time.time()


def test_a_finished_run_does_nothing_again(parts: dict[str, Path], tmp_path: Path) -> None:
    run = run_of(parts, tmp_path, train__max_steps=2, deepspeed__zero_stage=0)
    first, _ = cluster.run_training(run)
    again, text = cluster.run_training(run)
    assert again.uri == first.uri
    assert "training is complete (2 steps)" in text


def test_changed_data_and_other_settings_are_refused_by_name(parts: dict[str, Path], tmp_path: Path) -> None:
    data = tiny.write_records(tmp_path / "data", 30)
    run = run_of(parts | {"data": data}, tmp_path, train__max_steps=2)
    cluster.run_training(run)
    with pytest.raises(ConfigError, match=r"train\.learning_rate \(0\.005 → 0\.001\)"):
        cluster.run_training(run_of(parts | {"data": data}, tmp_path, train__max_steps=2, train__learning_rate=1e-3))
    wide = run_of(parts | {"data": data}, tmp_path, train__max_steps=2, scale__num_workers=4, scale__cpus_per_worker=16)
    with pytest.raises(ConfigError, match="scale needs 64 CPUs"):  # at once: no node joins a Ray of one's own
        cluster.run_training(wide)
    tiny.write_records(tmp_path / "data", 30, seed=9)
    with pytest.raises(
        DataError,
        match=r"the data changed \(\S+/data/part-000.jsonl now gives other packed sequences\) after the checkpoint",
    ):
        cluster.run_training(run)


def test_a_batch_larger_than_the_data_and_too_many_workers_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"packed sequences, fewer than train\.global_batch_size \(4096\)"):
        cluster.run_training(run_of(parts, tmp_path / "a", train__global_batch_size=4096))
    with pytest.raises(ConfigError, match="scale needs 64 CPUs"):
        cluster.run_training(run_of(parts, tmp_path / "b", scale__num_workers=64, train__global_batch_size=64))
    with pytest.raises(
        ConfigError, match=r"train\.precision fp16 needs GPUs, and the cluster has none; use bf16 or fp32"
    ):
        cluster.run_training(run_of(parts, tmp_path / "c", train__precision="fp16"))


@pytest.mark.long
def test_a_run_that_is_reproduced_gives_the_same_weights_and_a_changed_file_is_named(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_records(tmp_path / "data", 60)
    old = cluster.make_run(tmp_path, parts["model"], data, train__max_steps=4)
    first, _ = cluster.run_training(old)
    monkeypatch.setattr(session, "ray_session", lambda *_: nullcontext())
    assert main.main(["reproduce", old.directory]) == 0
    told = "reproduced bit for bit: data and losses of 4 steps, and the weights of step 4"
    assert told in capfd.readouterr().out
    second = list_checkpoints(f"{old.directory}-again")[0]
    assert cluster.weights_hash(first) == cluster.weights_hash(second)
    assert cluster.losses(old.directory) == cluster.losses(f"{old.directory}-again")
    assert first.meta["lineage"] == second.meta["lineage"], "what they came from is the same"
    shard = data / "part-001.jsonl"
    shard.write_text(shard.read_text().replace("hears", "heard", 1))
    check_before(old, old.directory, False, console.Console(cluster.Watched()))  # reads nothing
    assert main.main(["reproduce", old.directory, "--name", "third"]) == 2
    assert "part-001.jsonl now gives other packed sequences; restore them" in capfd.readouterr().err
    assert list_checkpoints(str(tmp_path / "third")) == [], "it stopped before it trained"


def test_a_probe_measures_steps_of_the_run_itself_and_leaves_nothing(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    run = run_of(parts, tmp_path / "runs", evaluate__every=1, data__eval=[{"path": str(parts["heldout"])}])
    file.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_unset=True)))
    monkeypatch.setattr(session, "ray_session", lambda _: nullcontext())
    assert main.main(["plan", str(file), "--card", "H200", "--probe", "--json"]) == 0
    said = capfd.readouterr()
    assert "probe: 10 steps of the run, as 'tiny-probe-" in said.err
    assert "step 10/10" in said.err
    tree = json.loads(said.out)
    found, length = tree["probed"], tree["length"]
    assert (found["workers"], found["num_steps"]) == (2, 6)
    assert 0 < found["tokens_per_s"] < 1e5, "a CPU's speed, not the card's"
    assert tree["seconds"] == pytest.approx(START_S + length["num_steps"] * found["step_s"])
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.long
def test_virtual_tokens_are_trained_compared_with_the_base_and_exported(parts: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    run = run_of(
        parts,
        tmp_path,
        method__type="prompt-tuning",
        method__num_virtual_tokens=8,
        train__learning_rate=0.05,
        train__label_smoothing=0.1,
        data__eval=[{"path": str(parts["heldout"])}],
    )
    found, _ = cluster.run_training(run)
    shown = console.Console(cluster.Watched())
    comparison, _ = compare(run, run.directory, shown)
    assert comparison.step == found.step == 12
    assert comparison.tuned.loss < 0.98 * comparison.base.loss
    assert comparison.tuned.num_answers == 4
    adapter = export(run, run.directory, shown)
    assert adapter.endswith("/model")
    loaded = PeftModel.from_pretrained(tiny.make_model(), adapter)
    trained = load_checkpoint(found, "weights.")
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, *trained.values())
    with pytest.raises(ConfigError, match=r"method\.type prompt-tuning can't be served"):
        serve.serve.__wrapped__(run.directory, console=shown)  # type: ignore[attr-defined] - the function of the command


def test_adapters_of_a_base_in_4_bits_are_merged_with_what_they_were_trained_on(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = run_of(parts, tmp_path, method__type="qlora", method__dropout=0, deepspeed__zero_stage=0, train__max_steps=4)
    found, _ = cluster.run_training(run)
    assert found.progress.finished
    target = export(run, run.directory, console.Console(cluster.Watched()))
    assert target.endswith("/merged")
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    tuned = load_tuned(run, found, "fp32").train()  # as it was trained: bitsandbytes answers in bf16 on some CPUs
    ids = torch.arange(5, 69)[None]
    with torch.no_grad(), tuned.disable_adapter():
        untrained = tuned(input_ids=ids).logits
    with torch.no_grad():
        wanted, got = (each(input_ids=ids).logits for each in (tuned, merged))
    assert (got - wanted).abs().max() < 1e-3 * (wanted - untrained).abs().max()


@pytest.mark.long
def test_non_finite_steps_are_skipped_counted_and_end_the_run(parts: dict[str, Path], tmp_path: Path) -> None:
    from ftray.errors import RunError

    run = run_of(
        parts, tmp_path, train__learning_rate=1e30, train__max_bad_steps=2, train__warmup=0, method__type="full"
    )
    with pytest.raises(
        RunError, match=r"steps had a non-finite loss or gradient. The limit train\.max_bad_steps is 2\."
    ):
        cluster.run_training(run)
    assert alerts_of(str(tmp_path / "tiny")) == ["not finite"], "once, and nothing unrelated"


def told_of(run: Any, fault: Callable[[], None], words: str) -> tuple[set[str], str]:
    """Kinds of the alerts of a run of 400 steps with a fault from its third on, and what the user saw.

    Once the words are said it is interrupted.
    """
    stream = cluster.Watched(("step 3/400", fault), (words, cluster.press_ctrl_c))
    with pytest.raises(Interrupted, match="checkpoint of step"):
        cluster.run_training(run, stream)
    return set(alerts_of(run.directory)), stream.getvalue()


@pytest.mark.long
def test_a_worker_that_is_held_up_is_told_and_nothing_else(parts: dict[str, Path], tmp_path: Path) -> None:
    run = run_of(parts, tmp_path, train__max_steps=400, train__global_batch_size=8)
    with cluster.slowed("RayTrainWorker", 0.1, 0.02) as slow:
        kinds, text = told_of(run, slow, "times as long as the others")
    assert kinds == {"straggler"}
    assert re.search(r"warning: step \d+: worker \d takes [\d.]+ times as long as the others", text)


@pytest.mark.long
def test_data_that_comes_late_is_told_and_nothing_else(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftray.events import alerts

    monkeypatch.setattr(alerts, "WAIT_S", 3.0)  # ten times shorter, as the run is
    run = run_of(parts, tmp_path, train__max_steps=400)
    with cluster.slowed(f"ray::{BatchCoordinator.__name__}", 3.0, 0.2) as slow:
        kinds, text = told_of(run, slow, "of the time, and GPUs idle")
    assert kinds == {"starving"}
    assert re.search(r"warning: step \d+: workers wait for data \d+% of the time", text)


@pytest.mark.long
def test_a_store_that_is_down_for_longer_than_its_deadline_costs_a_run_nothing_but_time(
    parts: dict[str, Path], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the last two: Ray's workers take the environment that Ray was started in."""
    settings: dict[str, Any] = {"train__max_steps": 24, "checkpoint__every": 2}
    smooth, _ = cluster.run_training(run_of(parts, tmp_path, **settings))
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "2")  # the minute of DESIGN's promise, shortened
    with FaultyProxy(s3.endpoint, 0.0, ("503", "reset")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        cluster.restart_ray()

        def go_down() -> None:
            proxy.fraction = 1.0
            threading.Timer(8.0, setattr, (proxy, "fraction", 0.0)).start()

        run = run_of(parts, tmp_path, storage=f"{s3.uri}/{tmp_path.name}", **settings)
        found, text = cluster.run_training(run, "step 3/24", go_down)
        assert proxy.count["503"] + proxy.count["reset"] > 0
        assert "restarting from step" not in text
        assert found.progress.finished
        assert cluster.losses(run.directory) == cluster.losses(str(tmp_path / "tiny"))
        assert cluster.weights_hash(found) == cluster.weights_hash(smooth)
        assert {one.step for one in list_checkpoints(run.directory)} == set(range(8, 25, 2))  # the last nine


@pytest.mark.long
def test_ranks_that_do_not_find_each_other_leave_their_room_to_the_next_group(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of its module, as the one before. Two groups at once have no room."""
    from ftray.errors import RunError

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
    cluster.restart_ray()
    run = run_of(parts, tmp_path, scale__max_failures=1, scale__cpus_per_worker=1.5, scale__wait_s=1)
    with pytest.raises(RunError, match=r"training failed 2 times in a row without a new checkpoint .*nowhere"):
        cluster.run_training(run)
