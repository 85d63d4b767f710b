"""Secrets in the environment, in addresses and in settings: after real commands, well and badly ended, no byte holds one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.e2e.command import Ended, Place
from tests.unit.test_trackers import READERS, curve_of_the_run

pytestmark = pytest.mark.long

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYAAAAAAAAAA",
    "AWS_SECRET_ACCESS_KEY": "canary/of+the/secret/access/key/0123456789",
    "AWS_SESSION_TOKEN": "canaryOfTheSessionToken0123456789abcdef",
    "HF_TOKEN": "hf_canaryOfTheHub0123456789abcdefghij",
    "WANDB_API_KEY": "0c0ffee0canary0f0wandb0123456789abcdef01",
    "FTRAY_API_KEY": "canary-of-one-client,canary-of-another-client",
    "OPENAI_API_KEY": "sk-canary-of-openai-0123456789abcdef",
}
IN_ADDRESSES = ("canary-password", "canarySignature0123")
CANARIES = [part for value in ENVIRONMENT.values() for part in value.split(",")] + list(IN_ADDRESSES)
NO_NETWORK = {
    "FTRAY_STORAGE_RETRY_S": "1",
    "WANDB_MODE": "offline",
    "AWS_ENDPOINT_URL": f"http://ann:{IN_ADDRESSES[0]}@127.0.0.1:1",
}


def found_in(text: bytes) -> list[str]:
    return [canary for canary in CANARIES if canary.encode() in text]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("place"))
    tiny.write_tiny_model(made.directory / "model")
    tiny.write_records(made.directory / "data", 60)
    ray_dir = tempfile.mkdtemp(prefix="ft", dir="/tmp")  # sockets' paths must be short
    made.env |= {**ENVIRONMENT, **NO_NETWORK, "RAY_TMPDIR": ray_dir}
    made.write(
        train__max_steps=4,
        data__eval={"fraction": 0.2},
        tracking__trackers=["tensorboard", "mlflow", "wandb"],
    )
    yield made
    made.close()
    shutil.rmtree(ray_dir)


def assert_clean(ended: Ended, code: int) -> None:
    assert ended.code == code, f"{ended.out}{ended.err}"
    assert found_in(f"{ended.out}{ended.err}".encode()) == [], f"{ended.out}{ended.err}"


def test_no_secret_is_in_anything_that_commands_leave(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.env["FTRAY_LOG"] = "json"
    ended = place.ftray("run", "run.yaml")
    assert_clean(ended, 0)
    lines = [json.loads(text) for text in ended.out.splitlines()]
    assert ended.err == ""
    assert [line["step"] for line in lines if line["event"] == "step"] == [0, 1, 2, 3]
    assert {line["rank"] for line in lines if line["event"] == "worker"} == {0, 1}
    assert {line["run"] for line in lines[1:]} == {"tiny"}
    run_dir = place.directory / "runs/tiny"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as the tracker does where it writes
    for name, read in READERS.items():  # while the run is here: trackers hold the curve of a real one
        assert len(read(run_dir, "loss")) == 4
        assert read(run_dir, "loss") == curve_of_the_run(run_dir, "loss", name), name
    failed = place.ftray(
        "train", "run.yaml", "name=failed", "train.learning_rate=1e38", "train.max_bad_steps=0", "scale.max_failures=0"
    )
    assert_clean(failed, 1)
    assert "could not be updated" not in failed.out
    assert json.loads(failed.err)["level"] == "error"
    del place.env["FTRAY_LOG"]
    assert_clean(place.ftray("report", "runs/failed"), 0)
    assert_clean(place.ftray("train", "run.yaml", "storage=s3://bucket/runs", "tracking.trackers=[]"), 2)
    for override in (
        f"data.train.0.path=https://x.org/a.jsonl?X-Amz-Signature={IN_ADDRESSES[1]}",
        f"storage=s3://ann:{IN_ADDRESSES[0]}@bucket/runs",
        f"model.base={ENVIRONMENT['HF_TOKEN']}",
        f"train.learning_rate={ENVIRONMENT['OPENAI_API_KEY']}",
        f"wandb_api_key={ENVIRONMENT['WANDB_API_KEY']}",
    ):
        assert_clean(place.ftray("train", "run.yaml", override), 2)
    assert_clean(place.ftray("check", "run.yaml", override), 2)
    searched = {}
    for top in (place.directory, place.cache, place.home, Path(place.env["RAY_TMPDIR"])):
        for file in top.rglob("*"):
            if file.is_file() and not file.is_symlink():
                searched[str(file)] = found_in(file.read_bytes())
    assert {name: found for name, found in searched.items() if found} == {}
    for part in ("report.html", "run.json", "state.safetensors", "MODEL_CARD.md", ".wandb", ".log", "gcs_server.out"):
        assert any(name.endswith(part) for name in searched), f"no {part} was searched"
