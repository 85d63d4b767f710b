"""The benchmark of training, small: whole runs of `ftray train`, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_scaling_measures_each_number_of_workers_through_ftray_train(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--method", "full", "--stage", "0", "--steps", "3", "--warmup", "1", "--seq", "128"]
    command = [sys.executable, "-m", "bench.scaling", "--workers", "1", "2", *arguments, "--document", "60"]
    told = subprocess.run(
        [*command, "--work", str(tmp_path)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    one, two, shares = (json.loads(line) for line in told.stdout.splitlines() if line.startswith("{"))
    assert "failed" not in one, one
    assert "failed" not in two, two
    assert one["tokens_per_s_per_gpu"] > 0
    assert set(shares["share_of_one"]) == {"1", "2"}
