"""The cluster's head is lost while a run trains: the driver says so, and the same command continues on a new cluster."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.cluster import wait_for
from tests.e2e.command import Place

FORKED_WORKERS = False  # signals and process trees are under test

NUM_STEPS = 240


class Head:
    """`ray start --head` as on a machine of its own: processes that are no children of the driver's."""

    def __init__(self, place: Place) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=false"]
        self._process = subprocess.Popen(
            [*command, "--node-ip-address=127.0.0.1", f"--port={self.address.rpartition(':')[2]}"],
            env={**place.env, "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(self._answers, "the head")

    def _answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0 and len(self._all()) > 3

    def _all(self) -> list[psutil.Process]:
        return [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]

    def lose(self) -> None:
        """What a power cut does."""
        if self._process.poll() is None:
            for process in self._all():
                process.kill()
        self._process.wait()


@contextmanager
def head_of(place: Place) -> Iterator[Head]:
    head = Head(place)
    place.env["RAY_ADDRESS"] = head.address
    try:
        yield head
    finally:
        head.lose()


@pytest.mark.long
def test_a_run_that_lost_its_head_ends_with_a_sentence_and_goes_on_with_a_new_one(place: Place) -> None:
    tiny.write_tiny_model(place.directory / "model")
    tiny.write_records(place.directory / "data", 60)
    place.write(train__max_steps=NUM_STEPS, checkpoint__every=20)
    with head_of(place) as head:
        command = place.start("train", "run.yaml")
        command.wait_for(f"train: step 1/{NUM_STEPS}")
        wait_for(lambda: any(place.directory.glob("runs/tiny/checkpoints/step-*/manifest.json")), "a checkpoint")
        head.lose()
        ended = command.wait()
    assert ended.code == 1, ended.out + ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("ftray: the Ray cluster's head is gone")
    assert last.endswith("run the same command again to continue")
    with head_of(place):
        again = place.ftray("train", "run.yaml")
    assert again.code == 0, again.out + again.err
    assert "train: continuing at step " in again.out
    lines = (place.directory / "runs/tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(NUM_STEPS))
