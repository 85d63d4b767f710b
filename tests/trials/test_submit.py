"""Jobs on a real cluster of three nodes that asks for a token: submitted, followed, continued, stopped, refused.

Run by hand, `python -m pytest -m long tests/trials`, where no other Ray runs: beside one, a new head may get no agent for
jobs, and the cluster then refuses them all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ftray import storage
from tests import tiny
from tests.cluster import losses, wait_for
from tests.nodes import TokenCluster
from tests.s3 import S3Server, free_ports

TOKEN = "0123456789abcdef" * 4
pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Site:
    """A cluster, and a run file for it."""

    cluster: TokenCluster
    run_file: Path
    run_dir: str

    def ftray(self, verb: str, *arguments: str, code: int = 0, **env: str) -> str:
        """Runs a command against the cluster, checks its exit code, and returns what it printed, errors last."""
        command = [sys.executable, "-m", "ftray.cli.main", verb, *arguments, "--address", self.cluster.address]
        done = subprocess.run(command, env={**self.cluster.env, **env}, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    def jobs(self, name: str) -> list[tuple[str, str, int | None]]:
        """(id, status, exit code) of a run's jobs."""
        rows = json.loads(self.ftray("status", name, "--json"))
        return [(row["job"], row["status"], row["exit_code"]) for row in rows]


@pytest.fixture(scope="module")
def site(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A head that carries no worker, two nodes, the data in a bucket, and this process outside of it."""
    root = tmp_path_factory.mktemp("submit")
    model = tiny.write_tiny_model(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        for shard in tiny.write_records(root / "data", 60).iterdir():
            storage.upload_file(str(shard), f"{s3_server.uri}/submit/data/{shard.name}")
        tree = {
            "name": "tiny",
            "storage": f"{s3_server.uri}/submit/runs",
            "model": {"base": str(model)},
            "method": {"type": "lora", "rank": 4, "alpha": 8},
            "data": {"max_seq_len": 128, "chunk_mb": 0.002, "train": [{"path": f"{s3_server.uri}/submit/data"}]},
            "train": {"max_steps": 6, "global_batch_size": 4, "learning_rate": 5e-3, "precision": "fp32"},
            "scale": {"num_workers": 2},
            "checkpoint": {"every": 3},
        }
        run_file = root / "tiny.yaml"
        run_file.write_text(yaml.safe_dump(tree))
        with TokenCluster(free_ports(1)[0], TOKEN, s3_server.env) as cluster:
            yield Site(cluster, run_file, f"{s3_server.uri}/submit/runs/tiny")


def test_a_run_is_submitted_once_followed_to_its_end_and_complete_after_that(site: Site) -> None:
    arguments = [str(site.run_file), "--verb", "train"]
    said = site.ftray("submit", *arguments, "--no-wait")
    assert "the cluster: nodes 3 reachable; gpus none; storage write" in said
    assert f"submitted tiny-1 to {site.cluster.address}  (config hash " in said
    said = site.ftray("submit", *arguments, "train.seed=3", code=2)
    assert "ftray: the job tiny-1 of this run is live with other settings" in said
    said = site.ftray("submit", *arguments)
    assert "the job tiny-1 is live; following it" in said
    assert "train: step 6/6" in said
    assert sorted(losses(site.run_dir)) == list(range(6))
    said = site.ftray("submit", *arguments, "--no-check")
    assert "submitted tiny-2" in said
    assert "training of 'tiny' is complete (6 steps)" in said
    assert site.jobs("tiny") == [("tiny-1", "SUCCEEDED", 0), ("tiny-2", "SUCCEEDED", 0)]
    assert "train: step 6/6" in site.ftray("logs", "tiny-1")
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", site.cluster.address]
    plain = [*ray, "--submission-id", "tiny-3", "--working-dir", ".", "--", "ftray", "train", "tiny.yaml"]
    done = subprocess.run(
        plain, cwd=site.run_file.parent, env=site.cluster.env, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, "training of 'tiny' is complete (6 steps)" in done.stdout) == (0, True), done.stdout


def test_the_exit_code_and_the_sentence_of_a_refused_run_come_back(site: Site) -> None:
    overrides = ["name=wrong", "data.train.0.path=s3://data/submit/nothing/"]
    said = site.ftray("submit", str(site.run_file), *overrides, "--verb", "train", "--no-check", code=2)
    assert "s3://data/submit/nothing" in said.splitlines()[-1]
    assert site.jobs("wrong") == [("wrong-1", "FAILED", 2)]


def test_a_stopped_run_commits_a_checkpoint_and_goes_on_when_it_is_submitted_again(site: Site) -> None:
    overrides = ["name=stopped", "train.max_steps=300", "checkpoint.every=200"]
    arguments = [str(site.run_file), *overrides, "--verb", "train", "--no-check"]
    site.ftray("submit", *arguments, "--no-wait")
    wait_for(lambda: "train: step" in site.ftray("logs", "stopped"), "the first step")
    said = site.ftray("stop", "stopped")
    assert "stopped; the same `ftray submit` continues the run stopped" in said
    assert site.jobs("stopped") == [("stopped-1", "STOPPED", None)]
    said = site.ftray("submit", *arguments)
    assert "submitted stopped-2" in said
    assert "train: continuing at step" in said
    assert sorted(losses(site.run_dir.replace("/tiny", "/stopped"))) == list(range(300))


def test_a_wrong_token_and_none_are_told(site: Site) -> None:
    remedy = "set RAY_AUTH_TOKEN to the cluster's own\n"
    said = site.ftray("status", code=2, RAY_AUTH_TOKEN="f" * 64)
    assert said == f"ftray: the cluster at {site.cluster.address} refuses the token in RAY_AUTH_TOKEN; {remedy}"
    said = site.ftray("status", code=2, RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled")
    assert said == f"ftray: the cluster at {site.cluster.address} asks for a token; {remedy}"


def test_storage_that_the_cluster_can_not_write_is_told_before_anything_is_submitted(site: Site) -> None:
    said = site.ftray("submit", str(site.run_file), "name=nowhere", "storage=s3://no-such-bucket/runs", code=2)
    assert f"ftray: the cluster at {site.cluster.address}: storage: " in said.splitlines()[-1]
    assert site.jobs("nowhere") == []


def test_the_doctor_joins_a_cluster_and_says_in_one_line_why_it_can_not(site: Site) -> None:
    command = [sys.executable, "-m", "ftray.cli.main", "doctor", str(site.run_file), "--json", "--links"]
    env = {**site.cluster.env, "RAY_ADDRESS": site.cluster.gcs_address}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    assert {row["check"]: row["verdict"] for row in found}["nodes"] == "ok", done.stdout + done.stderr
    assert found[0]["fact"] == "3 answer"
    assert found[-1]["fact"].startswith("all-reduce over 2 nodes at ")
    assert done.returncode == 0
    done = subprocess.run(command, env={**env, "RAY_AUTH_TOKEN": "f" * 64}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"ftray: RAY_ADDRESS {site.cluster.gcs_address}: no Ray cluster answers"
    )
