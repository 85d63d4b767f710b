"""`ftray runs list` and `ftray runs rm`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ftray import config, storage
from ftray.cli.main import main
from ftray.driver.run_record import open_run
from ftray.train.checkpoint.catalog import RunProgress
from ftray.train.checkpoint.tensors import TensorPart
from ftray.train.checkpoint.writer import CheckpointWriter

PARTS = [TensorPart("weights.a", (4,), 0, torch.ones(4))]


def open_named(root: Path, name: str) -> str:
    tree = {"name": name, "storage": str(root), "model": {"base": "org/base"}, "data": {"train": [{"path": "p"}]}}
    return open_run(config.parse_run(tree, "f"))


def commit(run_dir: str, step: int, loss: float | None, finished: bool) -> None:
    progress = RunProgress(step=step, finished=finished, best=None if loss is None else {"loss": loss, "step": step})
    writer = CheckpointWriter(run_dir, 9, {}, whole=True)
    writer.save(progress, PARTS, [{"step": n} for n in range(step)])
    writer.wait()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs in each state, a damaged one, and a directory that is no run."""
    root = tmp_path / "runs"
    commit(open_named(root, "done"), 3, 0.25, finished=True)
    commit(open_named(root, "halted"), 2, None, finished=False)
    open_named(root, "fresh")
    Path(open_named(root, "odd"), "run.json").write_text("[1]")
    (root / "notes").mkdir()
    return root


def test_a_list_says_the_state_of_each_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with storage.acquire_lease(str(runs / "halted")):
        assert main(["runs", "list", str(runs)]) == 0
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    assert ["done", "finished", "3", "0.2500", "lora", "org/base"] in lines
    assert ["fresh", "new", "0", "–", "lora", "org/base"] in lines
    assert ["halted", "running", "2", "–", "lora", "org/base"] in lines
    assert f"{runs}/odd is left out" in said.out + said.err
    assert main(["runs", "list", str(runs), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out.partition("[\n")[2].join(["[\n", ""]))
    assert {run["name"]: run["state"] for run in tree} == {"done": "finished", "fresh": "new", "halted": "stopped"}
    assert main(["runs", "list", str(runs / "notes")]) == 2
    assert "contains no run; give the directory" in capsys.readouterr().err


def test_only_a_run_that_nobody_uses_is_deleted_and_only_when_told(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, words in ((runs / "notes", "is not the directory of a run"), (runs / "done", "add --yes")):
        assert main(["runs", "rm", str(path)]) == 2
        assert words in capsys.readouterr().err
    with storage.acquire_lease(str(runs / "done")):
        assert main(["runs", "rm", str(runs / "done"), "--yes"]) == 2
    assert "is held by" in capsys.readouterr().err
    assert main(["runs", "rm", str(runs / "done"), "--yes"]) == 0
    assert not (runs / "done").exists()
    assert (runs / "halted").exists()
