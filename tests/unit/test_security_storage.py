"""Attacker: the holder of a storage prefix, who may write anything below `published/<base>/`.

Whatever lies there, every other adapter is served, a new replica starts, and the bad entry is counted with a reason.
"""

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftray import storage
from ftray.errors import StorageError
from ftray.serve import adapter_cache as catalog_module
from ftray.serve import registry as registry_module
from ftray.serve.adapter_cache import AdapterCache
from ftray.serve.metrics import ServeMetrics
from ftray.serve.model_files import lineages_of, reference_of
from ftray.serve.registry import list_published, registry_of, remove, scan
from ftray.serve.registry_schema import MAX_MANIFEST_BYTES
from ftray.serve.routes import build_api
from tests.unit.test_adapter_cache import META, HoldingEngine, life, put, served
from tests.unit.test_serve_protocol import call


def registry(tmp_path: Path) -> str:
    return registry_of(str(tmp_path), "org/small")


def plant(tmp_path: Path, name: str, data: bytes, version: str = "0007-0123456789ab") -> Path:
    """A manifest of any content."""
    path = Path(registry(tmp_path), name, version, "manifest.json")
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def whole(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], bytes]:
    """A manifest with a right checksum and one thing wrong in it, made from one that `publish` wrote."""

    def make(good: Path) -> bytes:
        tree = json.loads((good / "manifest.json").read_bytes())
        del tree["sha256"]
        change(tree)
        text = json.dumps(tree, sort_keys=True)
        return json.dumps({**tree, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()

    return make


def meta(**changes: Any) -> Callable[[Path], bytes]:
    return whole(lambda tree: tree["meta"].update(changes))


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda _: b"", "damaged"),
    "no JSON": (lambda _: b"{", "damaged"),
    "not UTF-8": (lambda _: b'{"files": "\xff"}', "damaged"),
    "a list": (lambda _: b"[1, 2]", "damaged"),
    "null": (lambda _: b"null", "damaged"),
    "deeply nested": (lambda _: b'{"files": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "damaged"),
    "nested within the parser's limit": (lambda _: b'{"meta": ' + b'{"a":' * 200 + b"1" + b"}" * 201, "damaged"),
    "huge": (lambda _: b'{"meta": "' + b"x" * MAX_MANIFEST_BYTES + b'"}', "size"),
    "NaN": (lambda _: b'{"files": {}, "meta": {"step": NaN}, "sha256": ""}', "damaged"),
    "a key twice": (lambda good: (good / "manifest.json").read_bytes().replace(b"{", b'{"meta": 1,', 1), "damaged"),
    "another checksum": (
        lambda good: (good / "manifest.json").read_bytes().replace(b'"step": 3', b'"step": 4'),
        "damaged",
    ),
    "no metadata": (whole(lambda tree: tree.pop("meta")), "damaged"),
    "more keys": (whole(lambda tree: tree.update(more=1)), "damaged"),
    "metadata null": (whole(lambda tree: tree.update(meta=None)), "metadata"),
    "metadata a list": (whole(lambda tree: tree.update(meta=[])), "metadata"),
    "lineage a number": (meta(lineage=5), "metadata"),
    "lineage with a line feed": (meta(lineage="abc\n"), "metadata"),
    "lineage too long": (meta(lineage="a" * 10_000), "metadata"),
    "base missing": (whole(lambda tree: tree["meta"].pop("base")), "metadata"),
    "base a list": (meta(base=["org/small"]), "metadata"),
    "step text": (meta(step="3"), "metadata"),
    "step true": (meta(step=True), "metadata"),
    "step negative": (meta(step=-1), "metadata"),
    "rank huge": (meta(rank=10**9), "metadata"),
    "owner empty": (meta(owner=""), "metadata"),
    "reference a number": (meta(reference=7), "metadata"),
    "reference a list": (meta(reference=[1]), "metadata"),
    "deciles text": (meta(reference={"prompt_tokens": "123456789"}), "metadata"),
    "deciles of text": (meta(reference={"prompt_tokens": ["a"] * 9}), "metadata"),
    "deciles null": (meta(reference={"prompt_tokens": [None] * 9}), "metadata"),
    "deciles without end": (meta(reference={"prompt_tokens": [1] * 10_000}), "metadata"),
    "scripts a list": (meta(reference={"scripts": ["Latin"]}), "metadata"),
    "a share of text": (meta(reference={"scripts": {"Latin": "1"}}), "metadata"),
    "a share above 1": (meta(reference={"scripts": {"Latin": 1e300}}), "metadata"),
    "files a list": (whole(lambda tree: tree.update(files=[])), "metadata"),
    "no files": (whole(lambda tree: tree.update(files={})), "metadata"),
    "a file's entry a number": (whole(lambda tree: tree["files"].update({"adapter_config.json": 3})), "metadata"),
    "no checksum of a file": (whole(lambda tree: tree["files"]["adapter_config.json"].pop("sha256")), "metadata"),
    "a file elsewhere": (
        whole(lambda tree: tree["files"].update({"../../x": tree["files"]["adapter_config.json"]})),
        "metadata",
    ),
    "a config of a gigabyte": (whole(lambda tree: tree["files"]["adapter_config.json"].update(size=10**9)), "size"),
    "signature a number": (meta(signature=1), "metadata"),
    "files of another version": (whole(lambda _: None), "metadata"),  # its directory's name is made from other files
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_entry_is_skipped_alone_counted_and_told_once(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "POLL_S", 0.01)
    make, kind = HOSTILE[case]
    good = Path(put(tmp_path, "polite"))
    # The version's name fits the files, so that nothing else is wrong with the entry.
    content = "0123456789ab" if case == "files of another version" else good.name.split("-")[1]
    bad = plant(tmp_path, "evil", make(good), version=f"0007-{content}")
    put(tmp_path, "victim")
    plant(tmp_path, "victim", make(good), version=f"0009-{content}")  # a bad newer version hides no good one

    async def work() -> None:
        meters = ServeMetrics()
        app = build_api(HoldingEngine(), served(tmp_path), max_tokens=5, metrics=meters)
        async with life(app):
            await asyncio.sleep(0.1)  # several looks
            listed = await call(app, "/v1/models")
            assert listed.status == 200
            assert [card["id"] for card in listed.json["data"]] == ["small", "small:polite", "small:victim"]
            for name in ("polite", "victim"):
                answer = await call(app, "/v1/completions", {"model": f"small:{name}", "prompt": "x"})
                assert answer.json["choices"][0]["text"] == name
            assert (await call(app, "/v1/completions", {"model": "small:evil", "prompt": "x"})).status == 404
            figures = b"".join((await call(app, "/metrics")).pieces).decode()
            assert f'ftray_adapters_rejected_total{{reason="{kind}"}} 2.0' in figures
            late = put(tmp_path, "late")  # the poll goes on
            async with asyncio.timeout(10):
                while "small:late" not in [c["id"] for c in (await call(app, "/v1/models")).json["data"]]:
                    await asyncio.sleep(0.01)
            assert late

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    lines = [record.message for record in caplog.records if str(bad.parent) in record.message]
    assert len(lines) == 1, lines
    assert "is not served: " in lines[0]
    assert len(lines[0]) < 1000


def test_a_name_of_many_bad_versions_is_read_once_not_at_each_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        plant(tmp_path, "evil", b"{", version=f"{number:04d}-0123456789ab")
    put(tmp_path, "polite")
    reads: list[str] = []
    real = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda uri, *bounds: reads.append(uri) or real(uri, *bounds))
    first = scan(registry(tmp_path))
    assert len(reads) == 51
    assert len(first.rejected) == 50
    again = scan(registry(tmp_path), first)
    assert len(reads) == 51
    assert (again.adapters, again.rejected) == (first.adapters, first.rejected)


def test_a_link_or_a_pipe_in_the_registry_is_not_followed(tmp_path: Path) -> None:
    good = Path(put(tmp_path, "polite"))
    place = Path(registry(tmp_path))
    (place / "everything").symlink_to("/")  # a walk of it would not end
    (place / "copied").symlink_to(place / "polite")
    (place / "inner").mkdir()
    (place / "inner/0001-0123456789ab").symlink_to(good)
    linked = place / "linked/0001-0123456789ab"
    linked.mkdir(parents=True)
    (linked / "manifest.json").symlink_to(good / "manifest.json")
    pipe = place / "pipe/0001-0123456789ab"
    pipe.mkdir(parents=True)
    os.mkfifo(pipe / "manifest.json")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(scan(str(place))), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "the scan hangs"
    assert list(found[0].adapters) == ["polite"]
    assert {one.name: one.kind for one in found[0].rejected.values()} == {
        "copied": "link",
        "inner": "link",
        "linked": "link",
        "pipe": "link",
    }


@pytest.mark.parametrize(
    "error", [StorageError("the bucket is down; try again"), ValueError("surprise"), KeyError("x")]
)
def test_no_error_ends_the_poll_or_keeps_a_replica_from_starting(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog_module, "POLL_S", 0.01)
    put(tmp_path, "polite")
    down, calls = True, 0
    real = registry_module.scan

    def shaky(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if down:
            raise error
        return real(*given, **options)

    monkeypatch.setattr(catalog_module, "scan", shaky)

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    async def work() -> None:
        nonlocal down
        app = build_api(HoldingEngine(), served(tmp_path), max_tokens=5)
        async with life(app):
            base = await call(app, "/v1/completions", {"model": "small", "prompt": "x"})
            assert base.json["choices"][0]["text"] == "base"
            early = await call(app, "/v1/completions", {"model": "small:polite", "prompt": "x"})
            assert (early.status, early.error["code"]) == (503, "model_unavailable")  # it may be published: no 404
            await until(lambda: calls > 3)
            down = False
            before = calls
            await until(lambda: calls > before + 1)
            answer = await call(app, "/v1/completions", {"model": "small:polite", "prompt": "x"})
            assert answer.json["choices"][0]["text"] == "polite"
            down, before = True, calls
            await until(lambda: calls > before + 3)
            assert (await call(app, "/v1/completions", {"model": "small:polite", "prompt": "x"})).status == 200
            assert (await call(app, "/v1/completions", {"model": "small:x", "prompt": "x"})).status == 404

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    assert (
        1 <= len([r for r in caplog.records if "Could not read the registry" in r.message]) <= 2
    )  # of each outage, once


def test_an_engine_that_fails_to_unload_does_not_end_the_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "POLL_S", 0.01)

    class Stubborn(HoldingEngine):
        async def unload_adapter(self, name: str) -> None:
            raise RuntimeError("no")

    async def work() -> None:
        put(tmp_path, "polite")
        catalog = AdapterCache(Stubborn(), served(tmp_path))
        await catalog.start()
        assert await catalog.prepare("small:polite")
        remove(registry(tmp_path), "polite")
        put(tmp_path, "later")
        async with asyncio.timeout(10):
            while catalog.model_ids() != ["small", "small:later"]:
                await asyncio.sleep(0.01)
        await catalog.stop()

    asyncio.run(work())


def test_what_the_store_does_not_hand_out_is_passed_over_and_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "polite")
    closed = put(tmp_path, "closed")
    tried = 0
    real = storage.read_range

    def refuse(uri: str, *bounds: int) -> bytes:
        nonlocal tried
        if uri.startswith(closed):
            tried += 1
            raise StorageError(f"{uri} can't be read: access denied")
        return real(uri, *bounds)

    monkeypatch.setattr(storage, "read_range", refuse)
    first = scan(registry(tmp_path))
    assert list(first.adapters) == ["polite"]
    assert [one.kind for one in first.rejected.values()] == ["unreadable"]
    assert (list(scan(registry(tmp_path), first).adapters), tried) == (["polite"], 1)
    monkeypatch.setattr(registry_module, "UNREADABLE_S", -1.0)
    second = scan(registry(tmp_path))
    monkeypatch.setattr(storage, "read_range", real)
    assert sorted(scan(registry(tmp_path), second).adapters) == ["closed", "polite"]


def test_files_that_are_changed_after_the_manifest_was_checked_are_not_loaded(tmp_path: Path) -> None:
    """Who may write to the registry swaps manifest and files once a replica has read the entry."""
    uri = Path(put(tmp_path, "polite"))

    async def work() -> None:
        engine = HoldingEngine()
        app = build_api(engine, served(tmp_path), max_tokens=5)
        async with life(app):
            (uri / "adapter_config.json").write_text(json.dumps({"reply": "evil"}))
            swapped = hashlib.sha256((uri / "adapter_config.json").read_bytes()).hexdigest()
            bad = whole(lambda tree: tree["files"]["adapter_config.json"].update(sha256=swapped))(uri)
            (uri / "manifest.json").write_bytes(bad)
            answer = await call(app, "/v1/completions", {"model": "small:polite", "prompt": "x"})
            assert (answer.status, engine.loads) == (503, [])

    asyncio.run(work())


def test_what_is_loaded_lies_in_the_cache_where_the_registrys_writers_can_not_change_it(tmp_path: Path) -> None:
    put(tmp_path, "polite")
    seen: list[str] = []

    class Looking(HoldingEngine):
        async def load_adapter(self, name: str, directory: str) -> None:
            seen.append(directory)
            await super().load_adapter(name, directory)

    async def work() -> None:
        catalog = AdapterCache(Looking(), served(tmp_path))
        await catalog.start()
        await catalog.prepare("small:polite")
        await catalog.stop()

    asyncio.run(work())
    (directory,) = seen
    assert Path(directory).is_relative_to(storage.cache_directory())


def test_a_link_in_place_of_an_adapters_file_is_refused(tmp_path: Path) -> None:
    uri = Path(put(tmp_path, "polite"))
    target = tmp_path / "elsewhere.safetensors"
    (uri / "adapter_model.safetensors").rename(target)
    (uri / "adapter_model.safetensors").symlink_to(target)  # even with the right bytes

    async def work() -> None:
        app = build_api(HoldingEngine(), served(tmp_path), max_tokens=5)
        async with life(app):
            answer = await call(app, "/v1/completions", {"model": "small:polite", "prompt": "x"})
            assert answer.status == 503

    asyncio.run(work())


def test_removing_a_name_that_is_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    put(tmp_path, "polite")
    precious = tmp_path / "precious"
    put_in = precious / "0001-0123456789ab"
    put_in.mkdir(parents=True)
    (put_in / "manifest.json").write_text("{}")
    (Path(registry(tmp_path)) / "linked").symlink_to(precious)
    with pytest.raises(Exception, match="symbolic link"):
        remove(registry(tmp_path), "linked")
    assert (put_in / "manifest.json").exists()
    assert list(list_published(registry(tmp_path))) == ["polite"]


@pytest.mark.parametrize(
    "text",
    [b"[]", b"7", b"{", b'{"prompt_tokens": 5}', b'{"prompt_tokens": [1, "a"]}', b'{"scripts": {"Latin": null}}',
     b'{"scripts": 1}', b"[" * 100_000, b'{"prompt_tokens": [1e999]}', b'"' + b"x" * 100_000 + b'"'],
)  # fmt: skip
def test_a_runs_damaged_reference_is_left_out(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/reference.json").write_bytes(text)
    assert reference_of(str(tmp_path)) == {}


@pytest.mark.parametrize("lineage", [5, None, [], {"a": 1}, "a b", "x" * 1000, "\x1b[31m"])
def test_a_lineage_that_is_none_is_left_out(tmp_path: Path, lineage: Any) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/x").write_text("x")
    assert storage.commit_directory(tmp_path / "model", str(tmp_path / "model"), {"lineage": lineage})
    assert lineages_of({"m": str(tmp_path / "model")}) == {}


def test_metrics_outlive_a_figure_that_can_not_be_made() -> None:
    meters = ServeMetrics()

    def fail() -> None:
        raise ValueError("bad reference")

    meters.refresh = fail
    meters.models.set(3)
    assert b"ftray_models 3.0" in meters.render()


def test_a_key_and_what_people_said_are_only_readable_by_their_owner(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        place = tmp_path / "run/human"
        storage.write_bytes(str(place / "key.json"), b"{}", private=True)
        assert storage.create_bytes(str(place / "answers/a.json"), b"{}", private=True)
        storage.write_bytes(str(place / "key.json"), b"[]", private=True)  # also when it is replaced
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in (tmp_path / "run").rglob("*")}
    assert modes == {
        "run/human": 0o700,
        "run/human/key.json": 0o600,
        "run/human/answers": 0o700,
        "run/human/answers/a.json": 0o600,
    }
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


assert META["base"] == "org/small"
