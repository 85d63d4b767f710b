"""ftray doctor: each fault that is planted is found, named with its machine, and comes with a remedy."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ftray import config, storage
from ftray.cli import main
from ftray.cluster import autoscaler, doctor, network_test
from ftray.cluster.doctor import HealthCheck, NodeFacts, examine, judge, worst_of
from ftray.errors import Preempted
from tests.s3 import S3Server, free_ports

ROOT = Path(__file__).parents[2]
VERSIONS = {"python": "3.11.7", **dict.fromkeys(doctor.PACKAGES, "1.0")}
WELL = NodeFacts(
    "a",
    VERSIONS,
    gpus=("NVIDIA A100-SXM4-40GB",) * 8,
    driver="580.1",
    memory_gib=1152,
    shm_gib=256,
    disk_gib=200,
    skew_s=0.1,
    store_skew_s=0.5,
    write_mb_s=300,
    read_mb_s=500,
    resources={"CPU": 92, "GPU": 8, "accelerator_type:A100": 1},
)
OTHER = replace(WELL, host="b")


def found(check: str, *nodes: NodeFacts, run: config.RunConfig | None = None) -> HealthCheck:
    return next(finding for finding in judge([*nodes], run) if finding.check == check)


def test_machines_that_are_well_are_found_well() -> None:
    run = config.load_run(ROOT / "jobs/full-8b.yaml")
    findings = judge([WELL, OTHER], run)
    assert [finding.verdict for finding in findings] == ["ok"] * 8
    facts = {finding.check: finding.fact for finding in findings}
    assert facts["gpus"] == "16 × NVIDIA A100-SXM4-40GB, driver 580.1"
    assert facts["storage"] == "write 300 MB/s, read 500 MB/s on the slowest node"
    assert facts["room"] == "for 16 workers"


@pytest.mark.parametrize(
    ("check", "fault", "verdict", "fact"),
    [
        ("nodes", {"error": "ModuleNotFoundError: No module named 'ftray'"}, "bad", "b: ModuleNotFoundError"),
        ("versions", {"versions": {**VERSIONS, "ftray": "0.9"}}, "bad", "ftray is 0.9 on b, 1.0 on a"),
        ("versions", {"versions": {**VERSIONS, "deepspeed": "missing"}}, "bad", "deepspeed is 1.0 on a, missing on b"),
        ("versions", {"versions": {**VERSIONS, "python": "3.12.1"}}, "bad", "python is 3.11.7 on a, 3.12.1 on b"),
        ("gpus", {"gpus": ("NVIDIA H100",) * 8}, "warn", "8 × NVIDIA A100-SXM4-40GB, 8 × NVIDIA H100"),
        ("gpus", {"driver": "570.2"}, "warn", "16 × NVIDIA A100-SXM4-40GB, drivers 570.2, 580.1"),
        ("gpus", {"resources": {"CPU": 92}}, "warn", "b has 8 GPUs, but Ray sees only 0"),
        ("storage", {"storage_error": "s3://x refused: 403"}, "bad", "b: s3://x refused: 403"),
        ("storage", {"write_mb_s": 3.0}, "warn", "write 3 MB/s, read 500 MB/s on the slowest node"),
        ("clock", {"skew_s": -9.0}, "warn", "b is 9 s off"),
        ("clock", {"store_skew_s": 400.0}, "bad", "b is 400 s off"),
        ("disk", {"disk_gib": 12.0}, "warn", "b has 12.0 GiB free in the cache"),
        ("disk", {"disk_gib": 1.0}, "bad", "b has 1.0 GiB free in the cache"),
        ("shm", {"shm_gib": 0.0625}, "bad", "b has 0.1 GiB in /dev/shm"),
        ("shm", {"shm_gib": 4.0}, "warn", "b has 4.0 GiB in /dev/shm"),
    ],
)
def test_a_planted_fault_is_found(check: str, fault: dict[str, object], verdict: str, fact: str) -> None:
    finding = found(check, WELL, replace(OTHER, **fault))  # type: ignore[arg-type]
    assert (finding.verdict, finding.fact[: len(fact)]) == (verdict, fact)
    assert finding.remedy
    assert found(check, WELL, OTHER).verdict == "ok"


def test_a_run_that_finds_no_room_is_told_what_lacks() -> None:
    run = config.load_run(ROOT / "jobs/full-8b.yaml")
    assert found("room", WELL, run=run).fact == "8 A100s, the run needs 16"
    assert (
        found("room", replace(WELL, resources={"CPU": 92, "GPU": 8, "accelerator_type:H100": 1}), run=run).verdict
        == "bad"
    )
    cpu = config.load_run(ROOT / "jobs/quickstart.yaml")
    one = replace(WELL, gpus=(), resources={"CPU": 1})
    assert found("room", one, run=cpu).fact == "1 workers' CPUs, the run needs 2"
    assert found("room", replace(one, resources={"CPU": 4}), run=cpu).verdict == "ok"
    assert autoscaler.bundles_of(run) == [{"CPU": 8.0, "GPU": 1.0, "accelerator_type:A100": 0.001}] * 16


def test_this_machine_is_described_truly(tmp_path: Path) -> None:
    facts = examine(str(tmp_path), size_bytes=100_000)
    assert facts.host == socket.gethostname()
    assert facts.versions["ray"] == __import__("ray").__version__
    assert facts.write_mb_s is not None
    assert facts.write_mb_s > 0
    assert facts.memory_gib > 0.5
    assert list(tmp_path.iterdir()) == [], "what was written for the measurement is gone"


def test_a_bucket_is_measured_and_its_clock_compared(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [examine(f"{s3.uri}/doctor", size_bytes=100_000) for _ in range(3)]  # a slow answer looks like a skew
    assert [facts.storage_error for facts in looks] == [""] * 3
    facts = min(looks, key=lambda facts: abs(facts.store_skew_s or 0.0))
    assert facts.store_skew_s is not None
    assert abs(facts.store_skew_s) < 30
    assert storage.list_files(f"{s3.uri}/doctor") == []
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 100)
        moved = examine(f"{s3.uri}/doctor", size_bytes=1000)
    assert found("clock", moved).verdict == "bad"
    assert found("clock", facts).verdict == "ok"


def test_no_bucket_and_wrong_keys_are_bad(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("storage", examine("s3://no-such-bucket/x", size_bytes=1000)).verdict == "bad"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    finding = found("storage", examine(f"{s3.uri}/doctor", size_bytes=1000))
    assert finding.verdict == "bad"


def test_the_verb_prints_lines_or_json_and_fails_where_something_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "SHM_BAD_GIB", 0.0)
    monkeypatch.setattr(doctor, "DISK_BAD_GIB", 0.0)
    assert main.main(["doctor", "--storage", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["check"] for row in rows] == ["nodes", "versions", "gpus", "storage", "clock", "disk", "shm"]
    monkeypatch.setattr(doctor, "DISK_BAD_GIB", 1e9)
    monkeypatch.setattr(doctor, "DISK_WARN_GIB", 1e9)
    assert main.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "bad  disk      " in said
    assert "→ free some, or set HOME" in said
    assert worst_of([HealthCheck("a", "warn", ""), HealthCheck("b", "bad", "")]) == HealthCheck("b", "bad", "")


def test_machines_are_asked_for_and_the_wish_is_withdrawn_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes: list[list[dict[str, float]]] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: wishes.append(bundles))  # noqa: PLW0108 - by its name
    monkeypatch.setattr(autoscaler, "POLL_S", 0.0)
    run = config.load_run(ROOT / "jobs/full-8b.yaml", ["scale.wait_s=60"])
    answers = iter([False, False, True])
    autoscaler.wait_for_nodes(run, lambda: next(answers))
    assert wishes == [autoscaler.bundles_of(run), []]
    wishes.clear()
    autoscaler.wait_for_nodes(run, lambda: True)
    assert wishes == [], "what is there isn't asked for"
    short = config.load_run(ROOT / "jobs/full-8b.yaml", ["scale.wait_s=0"])
    with pytest.raises(Preempted, match=r"no machines for 16 workers within 0 s \(scale\.wait_s\)"):
        autoscaler.wait_for_nodes(short, lambda: False)
    assert wishes == [autoscaler.bundles_of(short), []]


def test_ranks_measure_the_link_between_them() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, "-m", "ftray.cluster.network_test"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", address, "gloo"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for rank in range(2)
    ]
    speeds = [float(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    assert all(0.001 < speed < 1000 for speed in speeds)
    assert network_test.verdict_of(0.4, 2, "gloo").verdict == "ok"
    assert network_test.verdict_of(0.4, 2, "nccl") == HealthCheck(
        "links", "warn", "all-reduce over 2 nodes at 0.4 GB/s (nccl)", network_test.REMEDY["nccl"]
    )
