"""jobs/: every run file is complete, says how it is submitted, and asks for what its first lines promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftray import config
from ftray.cluster.instance_types import find_instance_type, plan_pods
from ftray.train.zero.config import deepspeed_config

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
CLUSTER_JOBS = [path for path in JOBS if config.load_run(path).storage.startswith("s3://")]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_run_file_is_accepted(path: Path) -> None:
    run = config.load_run(path)
    deepspeed_config(run.train, run.deepspeed, run.micro_batch_size, run.world_sizes[0])


@pytest.mark.parametrize("path", CLUSTER_JOBS, ids=lambda path: path.stem)
def test_every_run_file_for_a_cluster_shows_both_ways_to_submit_it(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    verb = "evaluate" if path.stem.startswith("evaluate") else "run"
    ours = f"#   ftray submit jobs/{path.name} {'--verb evaluate ' if verb == 'evaluate' else ''}--address http://HEAD:8265"
    assert ours in head
    name = config.load_run(path).name + ("-evaluate" if verb == "evaluate" else "")
    plain = "ray job submit --address http://HEAD:8265 --submission-id"
    assert f"#   {plain} {name}-1 --working-dir jobs -- ftray {verb} {path.name}" in head


@pytest.mark.parametrize(
    ("stem", "method", "stage", "sizes", "machine", "pods"),
    [
        ("lora-8b", "lora", 0, [8], "p4d.24xlarge", 1),
        ("full-8b", "full", 3, [16], "p4d.24xlarge", 2),
        ("qlora-70b", "qlora", 2, [8], "p4de.24xlarge", 1),
        ("lora-70b", "lora", 3, [32, 16], "p4d.24xlarge", 4),
        ("evaluate-8b", "lora", 0, [1], "p4d.24xlarge", 1),
    ],
)
def test_what_the_run_files_promise(
    stem: str, method: str, stage: int, sizes: list[int], machine: str, pods: int
) -> None:
    run = config.load_run(ROOT / "jobs" / f"{stem}.yaml")
    assert (run.method.type, run.deepspeed.zero_stage, run.world_sizes) == (method, stage, sizes)
    assert plan_pods(run, find_instance_type("A100", machine)).pods == pods


def test_the_evaluation_finds_the_run_that_lora_8b_trains() -> None:
    trained, evaluated = (config.load_run(ROOT / "jobs" / f"{stem}.yaml") for stem in ("lora-8b", "evaluate-8b"))
    assert (evaluated.directory, evaluated.config_hash) == (trained.directory, trained.config_hash)
    assert evaluated.evaluate.num_generations > trained.evaluate.num_generations
