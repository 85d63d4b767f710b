"""A Ray of the command's own is lost under it, or the terminal is: the command says so, goes on or ends in order."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from ftray import storage
from tests import tiny
from tests.cluster import wait_for
from tests.e2e.command import Command, Ended, Place

FORKED_WORKERS = False  # signals and process trees are under test

NUM_STEPS = 300


@pytest.fixture(scope="module")
def run(place: Place) -> Place:
    tiny.write_tiny_model(place.directory / "model")
    tiny.write_records(place.directory / "data", 60)
    place.write(train__max_steps=NUM_STEPS, checkpoint__every=20, scale__num_workers=1)
    return place


def ray_process(command: Command, name: str) -> psutil.Process:
    """The command's own process of Ray that is called so."""
    found = [p for p in psutil.Process(command.process.pid).children(recursive=True) if p.name() == name]
    assert len(found) == 1, found
    return found[0]


def wait_for_checkpoint(place: Place, name: str) -> None:
    wait_for(lambda: any(place.directory.glob(f"runs/{name}/checkpoints/step-*/manifest.json")), "a checkpoint")


def assert_whole(place: Place, name: str) -> None:
    lines = (place.directory / f"runs/{name}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(NUM_STEPS))


@pytest.mark.long
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_run_whose_ray_dies_starts_it_anew_once_and_goes_on(run: Place, name: str) -> None:
    command = run.start("train", "run.yaml", f"name=lost-{name}")
    wait_for_checkpoint(run, f"lost-{name}")
    lost = ray_process(command, name)
    lost.kill()
    ended = command.wait()
    assert ended.code == 0, ended.out + ended.err
    assert f"warning: Ray's {name} (pid {lost.pid}) died; restarting Ray, and continuing" in ended.out
    assert "train: continuing at step " in ended.out
    assert_whole(run, f"lost-{name}")
    assert run.left_over() == []


@pytest.mark.long
def test_a_run_whose_ray_dies_again_ends_with_a_sentence_and_continues_at_the_next_command(run: Place) -> None:
    command = run.start("train", "run.yaml", "name=again", f"train.max_steps={100 * NUM_STEPS}")
    wait_for_checkpoint(run, "again")
    ray_process(command, "raylet").kill()
    command.wait_for("train: workers continue at step")
    ray_process(command, "raylet").kill()
    ended = command.wait()
    assert_ended_in_order(ended, 1, "ftray: Ray's raylet (pid ")
    assert run.left_over() == []
    hang_up(run)


def hang_up(run: Place) -> None:
    """The terminal is closed: a checkpoint is committed, and nothing stays behind."""
    command = run.start("train", "run.yaml", "name=again", f"train.max_steps={100 * NUM_STEPS}", terminal=True)
    command.wait_for("train: workers continue at step")
    before = newest_step(run.directory / "runs/again")
    wait_for(lambda: newest_step(run.directory / "runs/again") > before, "another checkpoint")
    os.close(command.keyboard)
    assert command.process.wait(60) == 75
    step = newest_step(run.directory / "runs/again")
    assert step > before
    assert run.left_over() == []


def newest_step(run_dir: Path) -> int:
    newest = max(run_dir.glob("checkpoints/step-*/manifest.json")).parent
    assert storage.verify_directory(str(newest)) == []
    return int(newest.name.removeprefix("step-"))


def assert_ended_in_order(ended: Ended, code: int, beginning: str) -> None:
    assert ended.code == code, ended.out + ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith(beginning), ended.err
    assert last.endswith("run the same command again to continue")


@pytest.mark.long
def test_an_endpoint_whose_ray_dies_ends_with_a_sentence(run: Place) -> None:
    done = run.ftray("train", "run.yaml", "name=served", "train.max_steps=2")
    assert done.code == 0, done.out + done.err
    assert run.ftray("export", "runs/served").code == 0
    command = run.start("serve", "runs/served", "serve.port=0")
    command.wait_for("serving served at")
    ray_process(command, "gcs_server").kill()
    assert_ended_in_order(command.wait(), 1, "ftray: Ray's gcs_server (pid ")
    assert run.left_over() == []


@pytest.mark.long
def test_a_command_whose_process_is_killed_leaves_nothing_and_says_so(run: Place) -> None:
    command = run.start("train", "run.yaml", "name=killed", f"train.max_steps={100 * NUM_STEPS}")
    wait_for_checkpoint(run, "killed")
    (driver,) = psutil.Process(command.process.pid).children()
    driver.kill()
    ended = command.wait()
    assert ended.code == -signal.SIGKILL
    assert "ftray: the command was killed by SIGKILL" in ended.err
    assert run.left_over(10) == []
    command = run.start("train", "run.yaml", "name=killed", f"train.max_steps={100 * NUM_STEPS}")
    command.wait_for("train: continuing at step")
    command.process.kill()
    command.process.wait()
    assert run.left_over() == [], "with the command its child ends, and Ray with that"
