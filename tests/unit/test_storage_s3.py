"""What only S3 does to a run: refuses with a code, answers late, in part or never. A real server, a spoiling proxy."""

import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from ftray import storage
from ftray.errors import StorageError
from tests.s3 import FaultyProxy, S3Server


@pytest.fixture
def place(s3: S3Server, tmp_path: Path) -> str:
    return storage.join(s3.uri, "s3 only", tmp_path.name)


@pytest.fixture
def faulty(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Every third request goes wrong, in each of the four ways."""
    with FaultyProxy(s3.endpoint, 0.3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


# Refusals: one sentence with a remedy, at once, and no secret in it

REFUSED = {
    "wrong secret": (
        {"AWS_SECRET_ACCESS_KEY": "hidden-word"},
        "data",
        "refuses the signature .*; correct AWS_SECRET_ACC",
    ),
    "wrong key id": (
        {"AWS_ACCESS_KEY_ID": "hidden-word"},
        "data",
        "does not know the access key id .*; correct AWS_ACC",
    ),
    "no bucket": (
        {},
        "no-such-bucket",
        "bucket 'no-such-bucket' does not exist at http://127.*; create it, or correct",
    ),
    "bad bucket": ({}, "no bucket name", "no bucket name"),
    "bad endpoint": (
        {"AWS_ENDPOINT_URL_S3": "nonsense"},
        "data",
        "Invalid endpoint: nonsense .*; check the AWS_ settings",
    ),
    "no profile": ({"AWS_PROFILE": "nobody"}, "data", r"profile \(nobody\) could not be found"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_sentence_with_its_remedy(case: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, bucket, words = REFUSED[case]
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://{bucket}/run"
    actions = [storage.check_writable, storage.read_bytes, lambda u: storage.write_bytes(u, b"x"), storage.list_files]
    for action in actions:
        began_s = time.monotonic()
        with pytest.raises(StorageError, match=words) as no:
            action(uri)
        assert time.monotonic() - began_s < 40, "a refusal is not retried"
        assert not isinstance(no.value, storage.MissingFile)
        assert "\n" not in str(no.value)
        assert "hidden-word" not in str(no.value)
        assert "probe" not in str(no.value)


def test_a_machine_without_keys_is_told_to_set_them(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="needs S3 keys, and there are none; set AWS_ACCESS_KEY_ID"):
        storage.check_writable("s3://data/run")


def test_an_endpoint_that_nobody_answers_is_told_within_the_deadline(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "1.5")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    began_s = time.monotonic()
    with pytest.raises(
        StorageError, match=r"^http://127.0.0.1:1 can't be reached for s3://data/x within 1.5 s .*; check"
    ):
        storage.read_bytes("s3://data/x")
    assert time.monotonic() - began_s < 40


def test_a_password_in_the_endpoint_is_not_shown(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "0.2")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hidden-word@127.0.0.1:1")
    with pytest.raises(StorageError, match=r"^http://127.0.0.1:1 ") as no:
        storage.read_bytes("s3://data/x")
    assert "hidden-word" not in str(no.value)


def test_the_endpoint_may_be_given_in_either_of_its_variables_and_by_name(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint.replace("127.0.0.1", "localhost"))
    storage.check_writable("s3://data/run")


def test_a_wildcard_in_the_bucket_is_refused(s3: S3Server) -> None:
    with pytest.raises(StorageError, match="name the bucket"):
        storage.glob_files("s3://dat*/x")


def test_a_missing_bucket_is_not_an_absent_file(s3: S3Server) -> None:
    for ask in [storage.exists, storage.read_manifest, storage.acquire_lease]:
        with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
            ask("s3://no-such-bucket/run")


# Long listings, stale views, forks


def test_listings_go_on_past_a_page(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        storage.write_bytes(storage.join(place, f"{number}"), b"x")
    really = storage.s3.request

    def in_small_pages(operation: str, *arguments: object, **named: object) -> object:
        named |= {"MaxKeys": 3} if operation == "list_objects_v2" else {}
        return really(operation, *arguments, **named)

    monkeypatch.setattr(storage.s3, "request", in_small_pages)
    assert [info.path for info in storage.list_files(place)] == [str(number) for number in range(7)]


def test_what_another_client_writes_is_seen_at_once(s3: S3Server, place: str) -> None:
    assert storage.list_files(place) == []
    path = place.removeprefix("s3:/").replace(" ", "%20")
    assert s3.request("PUT", f"{path}/new", b"one")[0] == 200
    assert [info.size_bytes for info in storage.list_files(place)] == [3]
    assert s3.request("PUT", f"{path}/new", b"four")[0] == 200
    assert storage.size_and_etag(storage.join(place, "new"))[0] == 4


def _read_in_child(uri: str) -> None:
    os._exit(0 if storage.read_bytes(uri) == b"x" else 1)


def test_a_forked_child_makes_connections_of_its_own(place: str) -> None:
    storage.write_bytes(storage.join(place, "x"), b"x")
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(storage.join(place, "x"),))
    child.start()
    child.join(20)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert child.exitcode == 0


def test_a_file_that_changes_while_it_is_fetched_is_not_mixed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.transfer, "PART_BYTES", 1000)
    monkeypatch.setattr(storage.transfer, "NUM_THREADS", 1)
    uri = storage.join(place, "x")
    storage.write_bytes(uri, b"a" * 5000)
    really = storage.s3.read_range

    def read_and_change(uri: str, start: int, end: int, **condition: str) -> bytes:
        data = really(uri, start, end, **condition)
        if start == 2000:
            storage.write_bytes(uri, b"b" * 5000)
        return data

    monkeypatch.setattr(storage.s3, "read_range", read_and_change)
    with pytest.raises(StorageError, match="changed while it was read; try again"):
        storage.download_file(uri, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# Thirty faults in a hundred requests


def test_reads_and_writes_are_right_through_faults(faulty: FaultyProxy, place: str) -> None:
    random.seed(7)
    drawn = random.random()
    random.seed(7)
    errors: list[BaseException] = []

    def work(writer: int) -> None:
        try:
            for number in range(8):
                uri = storage.join(place, f"{writer}-{number}")
                data = random.Random(100 * writer + number).randbytes(20_000)
                storage.write_bytes(uri, data)
                assert storage.read_bytes(uri) == data
                assert storage.read_range(uri, 100, 20_100) == data[100:]
                assert storage.size_and_etag(uri)[0] == 20_000
            storage.delete(uri)
            assert not storage.exists(uri)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(storage.list_files(place)) == 28
    assert min(faulty.count.values()) > 0, faulty.count
    assert random.random() == drawn, "a retry draws from its own generator, not from the one that training seeds"


def test_a_creation_whose_answer_was_lost_is_still_known_as_won(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(s3.endpoint, 0.5, ("lost",), seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        uris = [storage.join(place, str(number)) for number in range(12)]
        assert [storage.create_bytes(uri, b"same") for uri in uris] == [True] * 12
        assert [storage.create_bytes(uri, b"same") for uri in uris] == [False] * 12
        assert proxy.count["lost"] > 5


def test_of_racing_creators_one_wins_through_faults(faulty: FaultyProxy, place: str) -> None:
    barrier = threading.Barrier(8)
    won: list[bool] = []

    def create() -> None:
        barrier.wait()
        won.append(storage.create_bytes(storage.join(place, "claim"), b"same"))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_a_directory_with_a_large_file_is_committed_and_fetched_through_faults(
    faulty: FaultyProxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.transfer, "PART_BYTES", 5 << 20)
    files = {"large.bin": random.Random(1).randbytes(12 << 20), **{f"{n}.bin": bytes([n]) * 1000 for n in range(6)}}
    for path, data in files.items():
        storage.write_bytes(str(tmp_path / "made" / path), data)
    assert storage.commit_directory(tmp_path / "made", place, {"step": 1})
    assert storage.verify_directory(place) == []
    storage.fetch_directory(place, tmp_path / "back")
    assert {path: (tmp_path / "back" / path).read_bytes() for path in files} == files


def test_a_completed_upload_whose_answer_was_lost_is_not_an_error(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.transfer, "PART_BYTES", 5 << 20)
    really, lost = storage.s3._send, []

    async def lose(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if operation != "complete_multipart_upload":
            return await really(client, operation, arguments)
        if lost:  # seaweedfs completes twice; others say this
            raise ClientError(
                {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, operation
            )
        lost.append(await really(client, operation, arguments))
        raise ConnectionResetError

    monkeypatch.setattr(storage.s3, "_send", lose)
    (tmp_path / "large").write_bytes(bytes(6 << 20))
    storage.upload_file(tmp_path / "large", storage.join(place, "large"))
    assert lost
    assert storage.size_and_etag(storage.join(place, "large"))[0] == 6 << 20


def test_a_store_that_is_down_is_told_after_the_deadline(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "1")
    clock = [0.0]  # only waiting takes time

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(storage.s3, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    with FaultyProxy(s3.endpoint, 0.0, ("503",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        assert not storage.exists(place)
        proxy.fraction = 1.0
        with pytest.raises(StorageError, match=r"gave no good answer for .* within 1 s \(last: 503\)"):
            storage.read_bytes(storage.join(place, "x"))
        assert 2 <= proxy.count["503"] <= 4, "after 0.1, 0.2 and 0.4 s the next wait would pass the deadline"


def test_an_owner_whose_store_is_down_holds_its_lease_for_lost(
    s3: S3Server, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(s3.endpoint, 0.0, ("503",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        lease = storage.acquire_lease(place, ttl_s=1.2)
        proxy.fraction = 1.0
        time.sleep(1.5)
        assert lease.lost
        lease.release()
        proxy.fraction = 0.0
        # It did not sign again: another may have the run by now.
        assert not json.loads(storage.read_bytes(storage.join(place, "lease/000001.json")))["released"]


class Expiring(FaultyProxy):
    """Answers every request signed with the key `old` as AWS does when a session is over."""

    async def _ask(self, request: bytes) -> bytes:
        if b"Credential=old/" not in request:
            return await super()._ask(request)
        body = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"
        head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % len(body)
        return head + body


def test_keys_that_expire_in_the_middle_are_read_anew(
    s3: S3Server, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    keys.write_text(text.format("old", "old"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("FTRAY_STORAGE_RETRY_S", "1")
    with Expiring(s3.endpoint, 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises(StorageError, match="has expired or is not valid; log in again"):
            storage.write_bytes(storage.join(place, "x"), b"1")
        renew = threading.Timer(1.5, keys.write_text, [text.format(s3.access_key, s3.secret_key)])
        renew.start()
        with storage.patient():  # what commits a checkpoint waits for new keys
            storage.write_bytes(storage.join(place, "x"), b"2")
        renew.join()
        assert storage.read_bytes(storage.join(place, "x")) == b"2"
