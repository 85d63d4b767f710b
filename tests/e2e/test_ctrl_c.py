"""Stopping a run: Ctrl-C in its terminal, twice, early; SIGTERM; a second terminal. One run, stopped again and again.

After each stop the same command continues at the committed step, and no process stays behind.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path

import pytest

from ftray import storage
from tests import tiny
from tests.e2e.command import Place, assert_refused

FORKED_WORKERS = False  # signals and process trees are under test

NUM_STEPS = 5000  # more than are made in all tests together


@pytest.fixture(scope="module")
def checkpoints(place: Place) -> Path:
    """Where the run's checkpoints are; its model, data and file are ready."""
    tiny.write_tiny_model(place.directory / "model")
    tiny.write_records(place.directory / "data", 60)
    place.write(train__max_steps=NUM_STEPS, checkpoint__every=NUM_STEPS, scale__num_workers=1)
    return place.directory / "runs/tiny/checkpoints"


def committed_step(checkpoints: Path) -> int:
    """The step of the newest checkpoint; fails unless all of its files are as its manifest says."""
    newest = max(checkpoints.glob("step-*/manifest.json")).parent
    assert storage.verify_directory(str(newest)) == []
    step = int(newest.name.removeprefix("step-"))
    manifest = storage.read_manifest(str(newest))
    assert manifest is not None
    assert manifest["meta"]["progress"]["step"] == step
    return step


def assert_says_how_to_continue(text: str) -> None:
    said = re.findall(r"^ftray: .*", re.sub(r"\x1b\[[0-?]*[@-~]", "", text), re.MULTILINE)
    assert len(said) == 1, text
    assert said[0].endswith("run the same command again to continue")


def test_ctrl_c_before_the_first_step_stops_without_a_mess(place: Place, checkpoints: Path) -> None:
    command = place.start("train", "run.yaml", terminal=True)
    command.wait_for("output of Ray and other libraries:")
    command.press_ctrl_c()
    ended = command.wait()
    assert ended.code == 130, ended.out
    assert_says_how_to_continue(ended.out)
    assert place.left_over() == []


def test_sigterm_before_the_first_step_is_a_preemption_too(place: Place, checkpoints: Path) -> None:
    command = place.start("train", "run.yaml")
    command.wait_for("data: indexing data.train")  # Ray is up, and no worker
    command.process.send_signal(signal.SIGTERM)
    ended = command.wait()
    assert ended.code == 75, ended.out + ended.err
    assert_says_how_to_continue(ended.err)
    assert place.left_over() == []


def test_ctrl_c_commits_a_checkpoint_and_a_second_terminal_is_refused_until_then(
    place: Place, checkpoints: Path
) -> None:
    command = place.start("train", "run.yaml", terminal=True)
    command.wait_for(f"train: step 3/{NUM_STEPS}")
    second = place.ftray("train", "run.yaml")
    assert_refused(second, "'tiny' is held by", f"on {socket.gethostname()} (pid {command.process.pid},", "stop it")
    assert "output of Ray" not in second.out + second.err
    command.press_ctrl_c()
    ended = command.wait()
    assert ended.code == 130, ended.out
    assert "Ctrl-C again: end at once" in ended.out
    step = committed_step(checkpoints)
    assert step >= 3
    assert f"checkpoint of step {step} is committed" in ended.out
    assert_says_how_to_continue(ended.out)
    assert place.left_over() == []


def test_the_same_command_continues_there_and_sigterm_stops_it_as_preempted(place: Place, checkpoints: Path) -> None:
    before = committed_step(checkpoints)
    command = place.start("train", "run.yaml")
    command.wait_for(f"train: continuing at step {before} from {checkpoints}")
    command.wait_for(f"train: step {before + 1}/{NUM_STEPS}")
    command.process.send_signal(signal.SIGTERM)
    ended = command.wait()
    assert ended.code == 75, ended.out + ended.err
    step = committed_step(checkpoints)
    assert step > before
    assert_says_how_to_continue(ended.err)
    assert f"step {step}" in ended.err
    assert place.left_over() == []


def test_a_second_ctrl_c_ends_at_once_and_loses_only_what_was_not_committed(place: Place, checkpoints: Path) -> None:
    before = committed_step(checkpoints)
    command = place.start("train", "run.yaml", terminal=True)
    command.wait_for(f"train: step {before + 2}/{NUM_STEPS}")
    command.press_ctrl_c()
    command.press_ctrl_c()
    ended = command.wait()
    assert ended.code == 130, ended.out
    assert_says_how_to_continue(ended.out)
    assert committed_step(checkpoints) >= before
    assert place.left_over() == []


def test_after_all_stops_every_step_was_done_once(place: Place, checkpoints: Path) -> None:
    before = committed_step(checkpoints)
    assert before > 0
    refused = place.ftray("train", "run.yaml", f"train.max_steps={before + 5}")
    assert_refused(refused, f"train.max_steps ({NUM_STEPS} → {before + 5})", "Choose another name")
    command = place.start("train", "run.yaml", terminal=True)
    command.wait_for(f"train: continuing at step {before} from")
    command.wait_for(f"train: step {before + 2}/{NUM_STEPS}")
    command.press_ctrl_c()
    assert command.wait().code == 130
    step = committed_step(checkpoints)
    assert step > before
    lines = (checkpoints.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(step))
