"""The whole path with shards and run directory in a bucket: nothing of the run on local disk but the cache."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from ftray import storage
from tests import tiny
from tests.e2e.command import Ended, Place, assert_refused
from tests.s3 import S3Server, free_ports

RUN = "s3://data/runs/tiny"


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, place: Place) -> Iterator[S3Server]:
    """The server, with its address and keys in this process's and the commands' environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
            place.env.pop(name, None)
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        place.env |= s3_server.env
        yield s3_server


@pytest.fixture(scope="module")
def ended(bucket: S3Server, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The whole file, once."""
    tiny.write_tiny_model(place.directory / "model")
    shards = tiny.write_records(tmp_path_factory.mktemp("shards"), 60)
    for shard in shards.iterdir():
        storage.upload_file(shard, f"s3://data/shards/{shard.name}")
    place.write(storage="s3://data/runs", data__train=[{"path": "s3://data/shards/"}], data__eval={"fraction": 0.2})
    return place.ftray("run", "run.yaml")


def files_of(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_shards_and_run_live_in_the_bucket(place: Place, ended: Ended) -> None:
    assert (ended.code, ended.err) == (0, "")
    assert f"Everything is in {RUN}:" in ended.out
    names = {info.path for info in storage.list_files(RUN)}
    assert {
        "run.json",
        "metrics.jsonl",
        "checkpoints/step-000006/manifest.json",
        "evaluate/results.json",
        "evaluate/generations.jsonl",
        "evaluate/endpoint.json",
        "model/adapter_model.safetensors",
        "model/merged/model.safetensors",
        "model/manifest.json",
    } <= names
    for committed in ("checkpoints/step-000003", "checkpoints/step-000006", "model"):
        assert storage.verify_directory(f"{RUN}/{committed}") == []
    lines = storage.read_bytes(f"{RUN}/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(6))


def test_nothing_but_the_cache_is_written_on_local_disk(place: Place, ended: Ended) -> None:
    ours = [name for name in files_of(place.directory) if not name.startswith("model/")]
    assert ours == ["run.yaml"]
    assert {name.split("/")[0] for name in files_of(place.home)} <= {".ray"}  # Ray's own token
    assert {name.split("/")[0] for name in files_of(place.cache)} == {"logs", "models"}


def test_the_same_command_again_says_that_the_run_is_complete(place: Place, ended: Ended) -> None:
    again = place.ftray("run", "run.yaml")
    assert (again.code, again.err) == (0, "")
    assert "the run 'tiny' is complete" in again.out
    assert "output of Ray" not in again.out


def test_the_endpoint_serves_out_of_the_bucket(place: Place, ended: Ended) -> None:
    command = place.start("serve", RUN, "serve.port=0")
    command.wait_for("(Ctrl-C drains and stops)")
    url = re.search(r"serving tiny at (\S+)", command.text)
    assert url
    client = openai.OpenAI(base_url=url[1], api_key="none is needed", max_retries=0)
    known = json.loads(storage.read_bytes(f"{RUN}/evaluate/endpoint.json"))
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": known["question"]}], max_tokens=64, temperature=0
    )
    assert reply.choices[0].message.content == known["answer"]
    command.process.send_signal(signal.SIGTERM)
    assert command.wait().code == 0
    assert place.left_over() == []


@pytest.mark.parametrize(
    ("environment", "overrides", "fragments"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, (), ("s3://data/", "AWS_SECRET_ACCESS_KEY")),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, (), ("s3://data/", "AWS_ACCESS_KEY_ID")),
        ({}, ("storage=s3://no-such-bucket/runs",), ("s3://no-such-bucket", "bucket")),
        ({}, ("data.train.0.path=s3://no-such-bucket/shards/", "storage=here"), ("s3://no-such-bucket", "bucket")),
        ({}, ("data.train.0.path=s3://data/no-such-folder/", "storage=here"), ("s3://data/no-such-folder", "correct")),
        ({}, ("storage=gs://data/runs",), ("gs://data/runs", "s3://bucket")),
    ],
    ids=["wrong-secret", "wrong-key", "no-bucket", "no-bucket-of-data", "no-folder", "other-scheme"],
)
def test_a_store_that_refuses_is_told_in_a_sentence_before_ray_starts(
    bucket: S3Server,
    place: Place,
    ended: Ended,
    environment: dict[str, str],
    overrides: tuple[str, ...],
    fragments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, "env", {**place.env, **environment})
    refused = place.ftray("run", "run.yaml", "name=other", *overrides)
    assert_refused(refused, *fragments)
    assert refused.seconds < 60, "the deadline of a store that does not answer"
    assert not [info for info in storage.list_files("s3://data/runs") if info.path.startswith("other/")]


def test_an_endpoint_that_nobody_listens_on_is_told_in_a_sentence(
    place: Place, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setattr(place, "env", {**place.env, "AWS_ENDPOINT_URL_S3": address, "FTRAY_STORAGE_RETRY_S": "1"})
    refused = place.ftray("run", "run.yaml")
    assert_refused(refused, address, "AWS_ENDPOINT_URL")
