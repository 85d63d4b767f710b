"""`ftray tune`, whose driver is killed in the middle: the same command continues, and says who won."""

from __future__ import annotations

import json
import os
import shlex
import signal
from typing import Any

import pytest

from tests import tiny
from tests.e2e.command import Place

pytestmark = pytest.mark.long


def state_of(place: Place) -> list[dict[str, Any]]:
    return json.loads((place.directory / "runs/tiny/tune/state.json").read_text())["trials"]


def test_a_sweep_whose_driver_was_killed_goes_on_by_the_same_command(place: Place) -> None:
    tiny.write_tiny_model(place.directory / "model")
    tiny.write_records(place.directory / "data", 30)
    tiny.write_records(place.directory / "heldout", 8, seed=1)
    space = {
        "train.learning_rate": {"type": "choice", "values": [5e-3, 1e-5, 1e-2]},
        "method.rank": {"type": "choice", "values": [2]},
    }
    place.write(
        data__eval=[{"path": "heldout"}],
        scale__num_workers=1,
        checkpoint__every=2,
        evaluate__every=2,
        tune={"search": "grid", "space": space, "max_concurrent": 1, "grace": 0.3, "reduction_factor": 2},
    )
    killed = place.start("tune", "run.yaml")
    killed.wait_for("trial-001: eval loss")
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert place.left_over() == [], "workers go with the driver"
    before = state_of(place)
    assert [t["status"] for t in before[:2]] == ["done", "stopped"]  # the third may just have begun

    ended = place.ftray("tune", "run.yaml")
    assert ended.code == 0, ended.out + ended.err
    assert f"3 trials, {len(before)} already started" in ended.out
    assert not {"trial-000: ", "trial-001: "} & {line[:11] for line in ended.out.splitlines()}, "not done again"
    after = state_of(place)
    assert after[:2] == before[:2], "what was decided stands"
    assert after[2]["status"] == "done"
    reports = [r for t in after for r in t["reports"]]
    assert sorted(r["at"] for r in reports) == list(range(len(reports)))

    assert ended.line("best: trial-002")
    command = shlex.split(ended.line("  train its settings:").split(":", 1)[1])
    assert command == ["ftray", "train", "run.yaml", "name=tiny-best", "train.learning_rate=0.01", "method.rank=2"]
