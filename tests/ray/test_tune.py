"""Sweeps on a Ray: data is read once, a stopped trial frees its workers, losses are those of a run alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group_table

from ftray import config, console, storage
from ftray.driver.run_record import open_run
from ftray.errors import DataError, Interrupted, RunError
from ftray.events.types import StepFinished
from ftray.report.sweep_page import render_page
from ftray.train.checkpoint.catalog import list_checkpoints
from ftray.tune.runner import sweep, winning_run
from ftray.tune.space import check_tune
from ftray.tune.state import SweepState, TrialRecord, open_state, save_state
from tests import cluster, tiny
from tests.events import Recorder

RATES = [1e-2, 2e-2, 1e-6]  # the last one learns nothing


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("parts")
    found = {
        "model": tiny.write_tiny_model(root / "model"),
        "data": tiny.write_records(root / "data", 60),
        "heldout": tiny.write_records(root / "heldout", 16, seed=1),
    }
    with cluster.local_ray(num_cpus=3):
        yield found


def run_of(parts: dict[str, Path], directory: Path, data: Path | None = None, **overrides: Any) -> config.RunConfig:
    tune = {
        "search": "grid",
        "space": {"train.learning_rate": {"type": "choice", "values": RATES}},
        "grace": 0.25,
        "reduction_factor": 2,
    }
    settings = {
        "data__eval": [{"path": str(parts["heldout"])}],
        "train__max_steps": 8,
        "scale__num_workers": 1,
        "checkpoint__every": 2,
        "evaluate__every": 2,
        "tune": tune,
        **overrides,
    }
    return cluster.make_run(directory, parts["model"], data or parts["data"], **settings)


def run_sweep(run: config.RunConfig, *script: Any, told: dict[str, list[Any]] | None = None) -> tuple[TrialRecord, str]:
    """Sweeps in this process, as the verb does; returns the winner and what the user saw. told: gets each trial's events."""
    stream = cluster.Watched(*script)
    check_tune(run)
    heard = {} if told is None else told

    def follow(trial: config.RunConfig) -> Recorder:
        return Recorder(heard.setdefault(trial.name, []))

    winner = sweep(run, open_run(run), console.Console(stream), "run.yaml", None, follow, render_page=render_page)
    return winner, stream.getvalue()


def state_of(run: config.RunConfig) -> SweepState:
    return open_state(run, f"{run.directory}/tune")


def assert_all_is_free() -> None:
    """No worker, no placement group and no reserved CPU is left."""
    cluster.wait_for(
        lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "CPUs to be given back"
    )
    states = [group["state"] for group in placement_group_table().values()]
    assert set(states) <= {"REMOVED"}, states


@pytest.mark.long
def test_a_sweep_reads_its_data_once_frees_what_it_took_and_changes_no_loss(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    data = Path(shutil.copytree(parts["data"], tmp_path / "data"))
    run = run_of(parts, tmp_path / "runs", data)
    # When the first trial begins, the records are gone: whoever reads them again fails.
    told: dict[str, list[Any]] = {}
    winner, text = run_sweep(
        run, ("trial-000: train.learning_rate=", lambda: data.rename(tmp_path / "away")), told=told
    )
    assert not data.exists()
    assert_all_is_free()

    trials = state_of(run).trials  # of the first two, the worse is given up if it comes second
    assert [winner.status, trials[2].status] == ["done", "stopped"], text
    assert winner.number < 2, text
    assert [r.step for r in trials[2].reports] == [2]
    given_up = list_checkpoints(f"{run.directory}/tune/trial-002")
    assert [found.step for found in given_up] == [2], "it did no step after it was given up, and what it did is kept"

    (tmp_path / "away").rename(data)
    alone = winning_run(run, run.directory, winner).model_copy(update={"storage": str(tmp_path / "alone")})
    cluster.run_training(alone)
    theirs, ours = (
        [json.loads(line) for line in storage.read_bytes(f"{place}/metrics.jsonl").splitlines()]
        for place in (f"{run.directory}/tune/{winner.name}", alone.directory)
    )
    same = ("step", "loss", "sequences", "num_tokens", "grad_norm", "learning_rate", "eval_loss")
    assert [[line.get(k) for k in same] for line in theirs] == [[line.get(k) for k in same] for line in ours]
    assert len(ours) == 8
    assert sorted(told) == ["trial-000", "trial-001", "trial-002"], "for Prometheus"
    steps = [event.loss for event in told[winner.name] if isinstance(event, StepFinished)]
    assert steps == [line["loss"] for line in theirs]

    results = json.loads(storage.read_bytes(f"{run.directory}/tune/results.json"))
    assert results["best"]["loss"] == min(line["eval_loss"] for line in ours if "eval_loss" in line)
    assert results["steps"] == {"done": sum(t.step for t in trials), "of": 24}
    assert storage.verify_directory(results["best"]["checkpoint"]) == []
    best = config.load_run(f"{run.directory}/tune/best.yaml")
    assert (best.name, best.config_hash, best.tune) == ("tiny-best", alone.config_hash, None)
    assert storage.exists(f"{run.directory}/tune/report.html")

    again, text = run_sweep(run)  # all is known: nothing is trained, the same is told
    assert again.name == winner.name
    assert "trial-000: train." not in text
    assert f"best: {winner.name}, eval loss {results['best']['loss']:.4f}" in text


def test_an_interrupted_sweep_goes_on_where_it_was_and_a_failed_trial_is_only_told(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    space = {"train.learning_rate": {"type": "choice", "values": [1e-2, 2e-2]}}
    run = run_of(parts, tmp_path, tune={"search": "grid", "space": space, "scheduler": "none", "max_concurrent": 1})
    with pytest.raises(Interrupted, match="2 of 2 trials are not done; run the same command again"):
        run_sweep(run, ("trial-000: eval loss", cluster.press_ctrl_c))
    assert_all_is_free()
    before = state_of(run).trials
    assert [t.status for t in before] == ["running"]
    stopped_at = list_checkpoints(f"{run.directory}/tune/trial-000")[0].step
    assert 2 <= stopped_at < 8

    (tmp_path / "tiny" / "tune" / "trial-001").write_text("")  # where its directory should be
    winner, text = run_sweep(run)
    after = state_of(run).trials
    assert winner.name == "trial-000"
    assert after[0].reports[: len(before[0].reports)] == before[0].reports
    assert [r.step for r in after[0].reports] == [2, 4, 6, 8], "each once"
    assert f"trial-000: eval loss {after[0].reports[0].loss:.4f}" not in text, "what was judged is not judged again"
    assert after[1].status == "failed"
    assert f"warning: trial-001 failed: {after[1].error}" in text
    assert_all_is_free()

    state = state_of(run)
    state.data_hash, state.trials[0].status = "other", "running"
    save_state(state, f"{run.directory}/tune")
    with pytest.raises(DataError, match=r"the data changed .* since the sweep in .* started"):
        run_sweep(run)


def test_a_sweep_of_failures_ends_with_the_first_one(parts: dict[str, Path], tmp_path: Path) -> None:
    run = run_of(parts, tmp_path)
    (tmp_path / "tiny" / "tune").mkdir(parents=True)
    for n in range(3):  # where a trial's directory should be there is a file
        (tmp_path / "tiny" / "tune" / f"trial-{n:03d}").write_text("")
    with pytest.raises(RunError, match="all trials failed; the first error was: "):
        run_sweep(run)
    assert [t.status for t in state_of(run).trials] == ["failed"] * 3
