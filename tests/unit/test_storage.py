"""Files, committed directories and leases keep their promises on a local disk and on a real S3 server alike."""

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from ftray import storage
from ftray.errors import CheckpointError, RunHeldError, StorageError

ROOT = Path(__file__).parents[2]
NUM_WRITERS = 16


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty directory with a space in its name: on disk, then on S3."""
    if request.param == "local":
        return str(tmp_path / "a place")
    return storage.join(request.getfixturevalue("s3").uri, "a place", tmp_path.name)


def test_a_mapped_file_outlives_what_it_was_mapped_from(place: str) -> None:
    uri = storage.join(place, "a file")
    storage.write_bytes(uri, b"what it held")
    mapped = storage.map_file(uri)
    storage.write_bytes(uri, b"something else")
    storage.delete(uri)
    assert mapped[:] == b"what it held"
    with pytest.raises(storage.MissingFile):
        storage.map_file(uri)


@contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another Python that has `storage` and `say`; killed at the end."""
    head = "import sys, threading, time\nfrom ftray import storage\ndef say(word): print(word, flush=True)\n"
    command = [sys.executable, "-c", head + code, *arguments]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def heard(child: subprocess.Popen[str]) -> str:
    return child.stdout.readline().strip()


def at_once(action: Callable[[int], Any], num_threads: int = NUM_WRITERS) -> list[Any]:
    """What `action(0)`, `action(1)`, … return or raise, each in a thread, all let go at one moment."""
    barrier = threading.Barrier(num_threads)
    results: list[Any] = [None] * num_threads

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = action(number)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def soon(condition: Callable[[], bool], deadline_s: float = 20.0) -> bool:
    """Whether a condition comes true in time; the machine may be busy."""
    deadline = time.monotonic() + deadline_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# Addresses


def test_an_address_has_one_spelling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/alice")
    assert storage.absolute("runs/../x y") == str(tmp_path / "x y")
    assert storage.absolute("~/runs") == "/home/alice/runs"
    assert storage.absolute("file:///data/a%20b/") == "/data/a b"
    assert storage.absolute("s3://bucket/a b//") == "s3://bucket/a b"
    assert [storage.is_remote(uri) for uri in ("s3://b/k", "/s3/b", "s3:/b")] == [True, False, False]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "s3:///x/"[:5], "file://host/x", "https://host/x"])
def test_an_address_of_another_kind_is_refused_naming_the_kinds_there_are(uri: str) -> None:
    with pytest.raises(StorageError, match=r"local path, file:///path or s3://bucket/path"):
        storage.absolute(uri)


def test_join_puts_one_slash_between_parts() -> None:
    assert storage.join("s3://b/", "/run 1/", "", "x.json") == "s3://b/run 1/x.json"
    assert storage.join("/", "tmp") == "/tmp"
    assert storage.join("relative", "a/b") == "relative/a/b"
    assert storage.join("s3://b/x") == "s3://b/x"


def test_local_files_need_no_s3_library(tmp_path: Path) -> None:
    code = """
storage.write_bytes(sys.argv[1] + "/x", b"x")
with storage.acquire_lease(sys.argv[1]):
    storage.list_files(sys.argv[1])
say(any(name.partition(".")[0] in ("s3fs", "fsspec", "botocore", "aiohttp") for name in sys.modules))
"""
    with process(code, str(tmp_path)) as child:
        assert heard(child) == "False"


# Reading and writing


def test_what_was_written_is_read(place: str) -> None:
    uri = storage.join(place, "deep er", "x.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    assert storage.read_bytes(uri) == b"first"
    before = storage.size_and_etag(uri)
    storage.write_bytes(uri, bytes(range(256)))
    assert storage.read_bytes(uri) == bytes(range(256))
    assert before[0] == 5
    assert storage.size_and_etag(uri)[0] == 256
    assert storage.size_and_etag(uri)[1] != before[1]
    assert storage.exists(uri)
    assert storage.exists(place)
    assert not storage.exists(storage.join(place, "deep"))
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_range_is_half_open_and_clipped_at_the_end_of_the_file(place: str) -> None:
    uri = storage.join(place, "digits")
    storage.write_bytes(uri, b"0123456789")
    for start, end in [(0, 10), (0, 1), (3, 7), (9, 10), (8, 99), (10, 20), (50, 60), (4, 4), (4, 2)]:
        assert storage.read_range(uri, start, end) == b"0123456789"[start:end], (start, end)
    storage.write_bytes(uri, b"")
    assert storage.read_range(uri, 0, 5) == storage.read_bytes(uri) == b""


@pytest.mark.parametrize(
    "read",
    [
        storage.read_bytes,
        storage.size_and_etag,
        lambda uri: storage.read_range(uri, 0, 4),
        lambda uri: storage.download_file(uri, "x"),
    ],
)
def test_reading_a_file_that_is_not_there_says_so(place: str, read: Callable[[str], object]) -> None:
    with pytest.raises(storage.MissingFile, match=r"none\.txt does not exist; check the (path|address)"):
        read(storage.join(place, "none.txt"))


def test_files_are_listed_below_a_directory_sorted_by_their_relative_path(place: str) -> None:
    for path in ["run/b.json", "run/a/z.json", "run/a b.txt", "run/a.json", "run 2/x.json", "running/x.json"]:
        storage.write_bytes(storage.join(place, path), path.encode())
    run = storage.join(place, "run")
    infos = storage.list_files(run)
    assert [info.path for info in infos] == ["a b.txt", "a.json", "a/z.json", "b.json"]
    assert [info.uri for info in infos] == [storage.join(run, info.path) for info in infos]
    assert [(info.size_bytes, info.etag) for info in infos] == [storage.size_and_etag(info.uri) for info in infos]
    assert [info.path for info in storage.list_files(run + "/", ".json")] == ["a.json", "a/z.json", "b.json"]
    assert [info.path for info in storage.list_files(storage.join(run, "b.json"))] == ["b.json"]
    assert storage.list_files(storage.join(place, "none")) == []


def test_a_pattern_finds_the_files_that_match_it(place: str) -> None:
    for path in ["a-1.jsonl", "a-2.jsonl", "b-1.jsonl", "a.txt", "x/a-3.jsonl", "x/y/a-4.jsonl", "odd[1].jsonl"]:
        storage.write_bytes(storage.join(place, path), b"{}")

    def found(pattern: str) -> list[str]:
        return [info.path for info in storage.glob_files(storage.join(place, pattern))]

    assert found("a-*.jsonl") == ["a-1.jsonl", "a-2.jsonl"]
    assert found("?-1.jsonl") == ["a-1.jsonl", "b-1.jsonl"]
    assert found("[!b]-[12].jsonl") == ["a-1.jsonl", "a-2.jsonl"]
    assert found("*/a-*.jsonl") == ["x/a-3.jsonl"]
    assert found("x/**/*.jsonl") == ["a-3.jsonl", "y/a-4.jsonl"] == found("x")
    assert found("**/a-4.jsonl") == ["x/y/a-4.jsonl"]
    assert found("odd[1].jsonl") == ["odd[1].jsonl"]
    assert found("a.txt") == ["a.txt"]
    assert found("none*") == found("none/*") == found("none") == []
    with pytest.raises(StorageError, match="must stand alone"):
        found("a**b")


def test_files_are_copied_in_both_directions_at_any_size(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.transfer, "PART_BYTES", 5 << 20)
    for size_bytes in [0, 1, 5 << 20, (11 << 20) + 7]:
        data = random.Random(size_bytes).randbytes(size_bytes)
        (tmp_path / "from here").write_bytes(data)
        uri = storage.join(place, f"{size_bytes}.bin")
        storage.upload_file(tmp_path / "from here", uri)
        storage.download_file(uri, tmp_path / "back" / "to here")
        assert (tmp_path / "back" / "to here").read_bytes() == data
        assert storage.size_and_etag(uri)[0] == size_bytes
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["to here"]


def test_a_tree_is_deleted_and_nothing_beside_it(place: str) -> None:
    for path in ["run/a", "run/b/c", "run/b/manifest.json", "run2/a"]:
        storage.write_bytes(storage.join(place, path), b"x")
    storage.delete_tree(storage.join(place, "run"))
    storage.delete_tree(storage.join(place, "run"))
    assert [info.path for info in storage.list_files(place)] == ["run2/a"]


@pytest.mark.parametrize("uri", ["/", "s3://data", "s3://data/"])
def test_a_whole_bucket_or_disk_is_not_deleted(uri: str) -> None:
    with pytest.raises(StorageError, match="all there is"):
        storage.delete_tree(uri)


def test_a_reader_sees_the_old_content_or_the_new_one_and_never_a_part(place: str) -> None:
    uri = storage.join(place, "x")
    contents = [bytes([number]) * 300_000 for number in range(8)]
    storage.write_bytes(uri, contents[0])
    seen = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(storage.read_bytes(uri))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents * 3:
        storage.write_bytes(uri, content)
    stop.set()
    reader.join()
    assert seen <= set(contents)
    assert [info.path for info in storage.list_files(place)] == ["x"]


def test_of_sixteen_threads_that_create_one_file_one_wins(place: str) -> None:
    for number in range(1 if storage.is_remote(place) else 20):  # seaweedfs takes seconds over some races
        uri = storage.join(place, f"claim-{number}")
        won = at_once(lambda writer, uri=uri: storage.create_bytes(uri, b"%d" % writer))
        assert sorted(won) == [False] * (NUM_WRITERS - 1) + [True]
        assert storage.read_bytes(uri) == b"%d" % won.index(True)


def test_of_sixteen_writers_in_four_processes_one_wins(place: str) -> None:
    code = """
storage.exists(sys.argv[1])
say("ready")
sys.stdin.readline()
won = []
def create(number):
    if storage.create_bytes(sys.argv[1] + "/claim", (sys.argv[2] + str(number)).encode()):
        won.append(sys.argv[2] + str(number))
threads = [threading.Thread(target=create, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
say(" ".join(won))
"""
    with ExitStack() as stack:
        children = [stack.enter_context(process(code, place, name)) for name in "abcd"]
        assert [heard(child) for child in children] == ["ready"] * 4
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        won = [name for child in children for name in heard(child).split()]
    assert len(won) == 1
    assert storage.read_bytes(storage.join(place, "claim")) == won[0].encode()


def test_a_created_file_is_never_seen_in_part(tmp_path: Path) -> None:
    seen = set()
    done = threading.Event()

    def read(number: int) -> None:
        while not done.is_set():
            for path in tmp_path.glob("claim-*"):
                seen.add(path.stat().st_size)

    reader = threading.Thread(target=read, args=(0,))
    reader.start()
    for number in range(30):
        storage.create_bytes(str(tmp_path / f"claim-{number}"), b"x" * 500_000)
    done.set()
    reader.join()
    assert seen == {500_000}


# What stands in the way, in a sentence


def test_a_place_that_can_be_written_passes_and_keeps_nothing(place: str) -> None:
    storage.check_writable(place)
    assert storage.list_files(place) == []
    assert storage.is_remote(place) or not Path(place).exists()


def test_a_path_below_a_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    below = str(tmp_path / "file" / "run")
    for action in [storage.check_writable, lambda uri: storage.write_bytes(uri, b""), storage.acquire_lease]:
        with pytest.raises(
            StorageError, match=r"a part of the path is a file and not a directory; choose another"
        ) as no:
            action(below)
        assert "probe" not in str(no.value)
    assert not storage.exists(below)


def test_a_place_where_nothing_can_be_made_is_refused() -> None:
    for uri in ["/proc/run", "/proc"]:
        with pytest.raises(StorageError, match=r"^/proc can't be written: .*; choose another place$"):
            storage.check_writable(uri)


@pytest.mark.parametrize(
    ("number", "words"),
    [(28, "no space is left"), (13, "no permission"), (30, "read-only"), (122, "quota"), (5, "error")],
)
def test_a_disk_that_refuses_is_told_in_words(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match=words) as no:
        storage.write_bytes(str(tmp_path / "x"), b"x")
    assert str(tmp_path / "x") in str(no.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_by_the_disk_itself() -> None:
    words = "no space is left on the device; free some"
    full = storage.local.guarded("/dev/full", "written")
    with pytest.raises(StorageError, match=words), full as path, path.open("wb", buffering=0) as file:
        file.write(b"x")


def test_a_link_to_nowhere_in_a_data_directory_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(storage.MissingFile, match=r"gone\.jsonl"):
        storage.list_files(str(tmp_path))


def test_linked_directories_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "linked").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "run" / "loop").symlink_to(tmp_path / "run")
    assert [info.path for info in storage.list_files(str(tmp_path / "run"))] == ["linked/x"]


# Committed directories

FILES = {"weights.bin": b"\x00\x01" * 5000, "state/rank 0.json": b'{"a": 1}', "state/empty": b""}
META = {"step": 200, "loss": 0.1 + 0.2, "10": 1, "9": 2}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A local directory to commit."""
    for path, data in FILES.items():
        storage.write_bytes(str(tmp_path / "made" / path), data)
    return tmp_path / "made"


def test_a_committed_directory_comes_back_whole(place: str, checkpoint: Path, tmp_path: Path) -> None:
    uri = storage.join(place, "step-000200")
    assert storage.read_manifest(uri) is None
    assert storage.commit_directory(checkpoint, uri, META)
    manifest = storage.read_manifest(uri)
    assert manifest is not None
    assert manifest["meta"] == META
    assert {path: entry["size"] for path, entry in manifest["files"].items()} == {p: len(d) for p, d in FILES.items()}
    assert storage.verify_directory(uri) == []
    storage.fetch_directory(uri, tmp_path / "back")
    assert {path: (tmp_path / "back" / path).read_bytes() for path in FILES} == FILES


def test_the_second_writer_of_a_directory_is_told_and_changes_nothing(place: str, checkpoint: Path) -> None:
    assert storage.commit_directory(checkpoint, place, {"writer": 1})
    (checkpoint / "weights.bin").write_bytes(b"other")
    assert not storage.commit_directory(checkpoint, place, {"writer": 2})
    assert storage.read_manifest(place)["meta"] == {"writer": 1}
    assert storage.verify_directory(place) == []


def test_of_writers_that_commit_at_once_one_wins(place: str, checkpoint: Path) -> None:
    won = at_once(lambda writer: storage.commit_directory(checkpoint, place, {"writer": writer}), 4)
    assert sorted(won) == [False, False, False, True]
    assert storage.read_manifest(place)["meta"] == {"writer": won.index(True)}
    assert storage.verify_directory(place) == []


def test_a_directory_is_committed_where_it_lies(checkpoint: Path) -> None:
    assert storage.commit_directory(checkpoint, str(checkpoint), META)
    assert storage.verify_directory(str(checkpoint)) == []
    assert not storage.commit_directory(checkpoint, str(checkpoint), META)


def test_an_empty_directory_and_one_with_a_manifest_are_not_committed(
    place: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="holds no file"):
        storage.commit_directory(tmp_path / "nothing", place, {})
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has a manifest\.json of its own"):
        storage.commit_directory(checkpoint, place, {})
    assert storage.read_manifest(place) is None


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_writer_killed_between_files_has_committed_nothing(place: str, checkpoint: Path, after: int) -> None:
    code = """
really, storage.transfer.NUM_THREADS, uploaded = storage.upload_file, 1, []
def upload(path, uri):
    really(path, uri)
    uploaded.append(uri)
    if len(uploaded) == int(sys.argv[3]):
        say("stopped")
        time.sleep(60)
storage.transfer.upload_file = upload
storage.commit_directory(sys.argv[1], sys.argv[2], {})
"""
    with process(code, str(checkpoint), place, str(after)) as child:
        assert heard(child) == "stopped"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert len(storage.list_files(place)) == after
    assert storage.read_manifest(place) is None
    assert storage.verify_directory(place) == [f"{place}/manifest.json is missing: the directory was not committed"]
    with pytest.raises(CheckpointError, match="is not committed"):
        storage.fetch_directory(place, checkpoint)
    assert storage.commit_directory(checkpoint, place, META)
    assert storage.verify_directory(place) == []


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "flipped": (flipped, "has another sha256"),
    "cut": (lambda data: data[:-1], "has {} bytes instead of {}"),
    "grown": (lambda data: data + b"x", "has {} bytes instead of {}"),
}


@pytest.mark.parametrize("path", ["weights.bin", "state/rank 0.json"])
def test_a_damaged_file_is_named(place: str, checkpoint: Path, tmp_path: Path, path: str) -> None:
    storage.commit_directory(checkpoint, place, META)
    uri = storage.join(place, path)
    whole = storage.read_bytes(uri)
    for change, words in DAMAGES.values():
        storage.write_bytes(uri, change(whole))
        assert storage.verify_directory(place) == [f"{path} {words.format(len(change(whole)), len(whole))}"]
        with pytest.raises(CheckpointError, match=path):
            storage.fetch_directory(place, tmp_path / "back")
        assert not (tmp_path / "back" / path).exists()
    storage.delete(uri)
    assert storage.verify_directory(place) == [f"{path} is missing"]
    with pytest.raises(CheckpointError, match=f"{path} is missing"):
        storage.fetch_directory(place, tmp_path / "back")
    storage.write_bytes(uri, whole)
    storage.fetch_directory(place, tmp_path / "back")


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "made" / "x"), b"x")
    uri = str(tmp_path / "made")
    storage.commit_directory(uri, uri, {"step": 7})
    manifest = storage.read_manifest(uri)
    text = (tmp_path / "made" / "manifest.json").read_bytes()
    for at in range(len(text)):
        (tmp_path / "made" / "manifest.json").write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        problems = storage.verify_directory(uri)
        assert all("manifest.json is damaged" in problem for problem in problems)
        if not problems:  # a blank became another blank
            assert storage.read_manifest(uri) == manifest, text[at - 5 : at + 5]
    (tmp_path / "made" / "manifest.json").write_bytes(text[:-20])
    with pytest.raises(CheckpointError, match=r"is damaged \(it is not JSON\); use the checkpoint before it"):
        storage.read_manifest(uri)


def test_a_manifest_can_not_write_outside_of_its_directory(tmp_path: Path) -> None:
    body: dict[str, Any] = {"files": {"../../evil": {"size": 1, "sha256": "0"}}, "meta": {}}
    manifest = {**body, "sha256": storage.commit._sum_of(body)}
    storage.write_bytes(str(tmp_path / "made" / "manifest.json"), json.dumps(manifest).encode())
    with pytest.raises(CheckpointError, match="outside of its directory"):
        storage.fetch_directory(str(tmp_path / "made"), tmp_path / "a" / "b")


def test_a_half_deleted_checkpoint_is_not_a_committed_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.commit_directory(checkpoint, str(checkpoint), META)
    monkeypatch.setattr(storage.local.shutil, "rmtree", lambda path: None)  # killed right after the manifest
    storage.delete_tree(str(checkpoint.parent))
    assert storage.read_manifest(str(checkpoint)) is None


# Leases

HOLD = """
lease = storage.acquire_lease(sys.argv[1], ttl_s=60)
say("held")
sys.stdin.readline()
"""


def lease_files(run: str) -> list[str]:
    return [info.path for info in storage.list_files(storage.join(run, "lease"))]


def foreign_lease(run: str, number: int = 1, **changes: Any) -> None:
    """A lease of a process on another machine, written now."""
    record = {
        **storage.lease._this_process(),
        "host": "host-7",
        "user": "alice",
        "pid": 4242,
        "machine": "other",
        "ttl_s": 60.0,
    }
    record |= {"since": "2026-11-21T22:10:05+00:00", **changes}
    storage.write_bytes(storage.join(run, "lease", f"{number:06d}.json"), json.dumps(record).encode())


def silence(error: Exception) -> int:
    """Seconds since the owner's last sign of life, as a refusal tells them."""
    said = re.search(r"last sign of life (\d+) s ago", str(error))
    assert said
    return int(said[1])


def test_a_second_process_is_refused_and_told_who_holds_the_run(place: str) -> None:
    with process(HOLD, place) as child:
        assert heard(child) == "held"
        with pytest.raises(
            RunHeldError, match=rf"\(pid {child.pid}, since 20..-..-.. ..:.. UTC, last sign of life \d+ s ago"
        ):
            storage.acquire_lease(place)
        child.kill()
        began_s = time.monotonic()
        # First unreaped, so still in the process table; its owner is taken for dead at once all the same.
        while True:
            try:
                storage.acquire_lease(place).release()
                break
            except RunHeldError:
                assert time.monotonic() - began_s < 20
        assert lease_files(place) == ["000001.json", "000002.json"]


def test_the_owner_is_named_in_full(place: str) -> None:
    foreign_lease(storage.join(place, "my run"))
    words = (
        r"^run 'my run' is held by alice on host-7 \(pid 4242, since 2026-11-21 22:10 UTC, "
        r"last sign of life \d+ s ago\); wait for it, or stop it there$"
    )
    with pytest.raises(RunHeldError, match=words):
        storage.acquire_lease(storage.join(place, "my run/"))


def test_a_released_lease_is_taken_at_once_and_old_files_go(place: str) -> None:
    for number in range(1, 7):
        with storage.acquire_lease(place, owner={"command": "train"}) as lease:
            assert not lease.lost
            assert lease_files(place)[-1] == f"{number:06d}.json"
            with pytest.raises(RunHeldError):
                storage.acquire_lease(place)
        lease.release()
    assert lease_files(place) == ["000004.json", "000005.json", "000006.json"]
    assert json.loads(storage.read_bytes(storage.join(place, "lease/000006.json")))["command"] == "train"


def test_a_lease_without_sign_of_life_is_taken_after_its_own_ttl(tmp_path: Path) -> None:
    foreign_lease(str(tmp_path), ttl_s=100.0)
    for age_s, held in [(0, True), (80, True), (101, False)]:
        os.utime(tmp_path / "lease" / "000001.json", (time.time() - age_s,) * 2)
        with pytest.raises(RunHeldError, match=r"last sign of life \d+ s ago") if held else nullcontext() as refused:
            storage.acquire_lease(str(tmp_path), ttl_s=0.01).release()
        if refused is not None:
            assert age_s <= silence(refused.value) < age_s + 20


def test_a_living_owner_keeps_its_lease_past_the_ttl(place: str) -> None:
    def silent_s() -> int:
        with pytest.raises(RunHeldError) as refused:
            storage.acquire_lease(place)
        return silence(refused.value)

    with storage.acquire_lease(place, ttl_s=24.0) as lease:  # signs every four seconds
        assert soon(lambda: silent_s() >= 2, 60)
        assert soon(lambda: silent_s() <= 1, 60), "it signed again"
        assert not lease.lost


def test_a_pid_that_was_used_again_is_not_the_owner(tmp_path: Path) -> None:
    here = storage.lease._this_process()
    foreign_lease(str(tmp_path), pid=here["pid"], machine=here["machine"], process_start="1")
    storage.acquire_lease(str(tmp_path)).release()
    foreign_lease(str(tmp_path), 3, pid=here["pid"], machine=here["machine"], process_start=here["process_start"])
    with pytest.raises(RunHeldError):
        storage.acquire_lease(str(tmp_path))


def test_of_takers_of_a_stale_lease_one_wins(place: str) -> None:
    for number in range(1, 4 if storage.is_remote(place) else 20, 2):
        foreign_lease(place, number, ttl_s=-math.inf)
        taken = at_once(lambda _: storage.acquire_lease(place), 8)
        leases = [lease for lease in taken if isinstance(lease, storage.Lease)]
        assert len(leases) == 1
        assert [type(other) for other in taken if other is not leases[0]] == [RunHeldError] * 7
        leases[0].release()


def test_a_taker_that_slept_while_others_came_and_went_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign_lease(str(tmp_path), 9)
    really = storage.lease._lease_numbers
    old_views = [[3]]  # what it saw before it slept; 4 has been used and cleared since
    monkeypatch.setattr(
        storage.lease, "_lease_numbers", lambda folder: old_views.pop() if old_views else really(folder)
    )
    with pytest.raises(RunHeldError, match="alice"):
        storage.acquire_lease(str(tmp_path))
    assert lease_files(str(tmp_path)) == ["000009.json"]


def test_an_owner_notices_that_another_took_the_run(place: str) -> None:
    with storage.acquire_lease(place, ttl_s=3) as lease:
        foreign_lease(place, 2)
        assert soon(lambda: lease.lost)
    assert not json.loads(storage.read_bytes(storage.join(place, "lease/000002.json")))["released"]


def test_an_owner_that_can_not_reach_the_store_holds_its_lease_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(uri: str, data: bytes) -> None:
        raise StorageError("not now")

    warnings: list[str] = []
    with storage.acquire_lease(str(tmp_path), ttl_s=3.0, warn=warnings.append) as lease:
        monkeypatch.setattr(storage.files, "write_bytes", unreachable)
        assert not lease.lost
        assert soon(lambda: lease.lost)
        monkeypatch.undo()
        assert soon(lambda: not lease.lost)
    assert len(warnings) == 1, "one for each time that the store goes away"
    assert warnings[0].startswith(
        "cannot renew the run's lease: not now. Retrying; if renewal keeps failing for 3 s, another"
    )


def test_a_store_that_became_read_only_is_said_to_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with storage.acquire_lease(str(tmp_path)):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(StorageError, match=r"can't be written: the file system is read-only"):
        storage.acquire_lease(str(tmp_path))


def test_a_file_of_another_size_than_its_writer_says_is_not_committed(place: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    entry = storage.put_file(str(tmp_path / "weights"), place, "weights")
    for size, there in ((2, "weights"), (4, "weights"), (3, "missing")):
        with pytest.raises(CheckpointError, match=rf"has (3|no) bytes instead of {size}, so .* is not committed"):
            storage.commit_files(place, {there: {**entry, "size": size}}, {})
    assert storage.read_manifest(place) is None
    assert storage.commit_files(place, {"weights": entry}, {})
