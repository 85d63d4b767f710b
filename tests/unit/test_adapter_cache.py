"""The registry and what replicas make of it: versions, removal, names that are only compared, the least recently used."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ftray import storage
from ftray.engine.protocol import OutputChunk, SamplingParams
from ftray.errors import ConfigError, ModelError
from ftray.serve import adapter_cache as catalog_module
from ftray.serve.adapter_cache import AdapterCache, ServedModels
from ftray.serve.openai import RequestError
from ftray.serve.registry import base_name, list_published, publish, registry_of, remove
from ftray.serve.routes import build_api
from tests.unit.test_serve_protocol import PaperEngine, call

META = {"base": "org/small", "revision": None, "run": "r", "step": 3}
LAYER = "model.layers.0.q_proj"


class HoldingEngine(PaperEngine):
    """Holds adapters; answers with the name that the adapter's file tells."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, str] = {}
        self.loads: list[str] = []

    async def load_adapter(self, name: str, directory: str) -> None:
        await asyncio.sleep(0.01)
        told = json.loads(Path(directory, "adapter_config.json").read_text())
        if told.get("poison"):
            raise ModelError("does not fit")
        self.held[name] = told["reply"]
        self.loads.append(told["reply"])

    async def unload_adapter(self, name: str) -> None:
        del self.held[name]

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> AsyncGenerator[OutputChunk, None]:
        return self._say(self.held[adapter] if adapter else "base")

    async def _say(self, reply: str) -> AsyncGenerator[OutputChunk, None]:
        await asyncio.sleep(0)
        yield OutputChunk(reply, [1], "stop", 1, 1)


def write_model(root: Path, reply: str, rank: int = 2, **options: Any) -> str:
    """A run's `model/`: an adapter, and whole weights beside it; committed."""
    (root / "merged").mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "reply": reply, **options}
    (root / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {"A": np.full((2, 8), 0.5, np.float32), "B": np.ones((4, 2), np.float32)}
    names = {f"base_model.model.{LAYER}.lora_{part}.weight": tensor for part, tensor in tensors.items()}
    save_file(names, root / "adapter_model.safetensors")
    save_file({f"{LAYER}.weight": np.zeros((4, 8), np.float32)}, root / "merged/model.safetensors")
    assert storage.commit_directory(root, str(root), {"step": 3})
    return str(root)


def put(tmp_path: Path, name: str, reply: str | None = None, meta: dict[str, Any] = META, **options: Any) -> str:
    source = write_model(tmp_path / f"runs/{name}-{reply}", reply or name, **options)
    found, is_new = publish(registry_of(str(tmp_path), "org/small"), name, source, f"{source}/merged", meta)
    assert is_new
    return found.uri


def served(tmp_path: Path, max_adapters: int = 8) -> ServedModels:
    return ServedModels("small", {}, registry_of(str(tmp_path), "org/small"), "org/small", None, max_adapters)


def test_a_published_version_is_immutable_committed_and_only_two_files(tmp_path: Path) -> None:
    uri = put(tmp_path, "polite")
    assert uri.startswith(f"{tmp_path}/published/small/polite/0001-")
    assert {info.path for info in storage.list_files(uri)} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    assert storage.verify_directory(uri) == []
    second = put(tmp_path, "polite", "anew")
    assert second.startswith(f"{tmp_path}/published/small/polite/0002-")
    registry = registry_of(str(tmp_path), "org/small")
    (found,) = list_published(registry).values()
    assert (found.uri, found.meta["step"], found.meta["rank"]) == (second, 3, 2)
    source = str(tmp_path / "runs/polite-anew")
    assert publish(registry, "polite", source, f"{source}/merged", META)[1] is False  # the same bytes again
    shutil.rmtree(second)  # the newest is taken back by hand: the one before it is served again
    assert list_published(registry)["polite"].uri == uri
    assert remove(registry, "polite") == 1
    assert list_published(registry) == {}
    with pytest.raises(ConfigError, match="no adapter polite is published"):
        remove(registry, "polite")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".x", "x.", "x" * 64, "a:b", "ä", "x\n"])
def test_names_that_could_be_paths_are_refused(tmp_path: Path, name: str) -> None:
    source = write_model(tmp_path / "m", "x")
    registry = registry_of(str(tmp_path), "org/small")
    for work in (lambda: publish(registry, name, source, f"{source}/merged", META), lambda: remove(registry, name)):
        with pytest.raises(ConfigError, match="cannot be an adapter's name"):
            work()
    assert not (tmp_path / "published").exists()


def test_what_does_not_fit_or_was_damaged_is_not_published(tmp_path: Path) -> None:
    registry = registry_of(str(tmp_path), "org/small")
    wrong_rank = write_model(tmp_path / "a", "x", rank=3)
    with pytest.raises(ModelError, match=r"\[2, 8\], expected \[3, 8\]"):
        publish(registry, "x", wrong_rank, f"{wrong_rank}/merged", META)
    other_base = write_model(tmp_path / "b", "x")
    save_file({f"{LAYER}.weight": np.zeros((4, 9), np.float32)}, tmp_path / "b/merged/model.safetensors")
    with pytest.raises(ModelError, match="belongs to another model"):
        publish(registry, "x", other_base, f"{other_base}/merged", META)
    flipped = write_model(tmp_path / "c", "x")
    weights = tmp_path / "c/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is damaged; .*ftray export"):
        publish(registry, "x", flipped, f"{flipped}/merged", META)
    weights.write_bytes(b"pickle")
    with pytest.raises(ModelError, match="not a valid safetensors file"):
        publish(registry, "x", flipped, f"{flipped}/merged", META)
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"),
        ("embedded:smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("/models/my base/", "my-base"),
        ("../..", "base"),
    ],
)
def test_a_base_is_called_by_the_last_part_of_its_name(base: str, name: str) -> None:
    assert base_name(base) == name


def test_the_list_of_models_names_the_lineage_of_each_that_has_one(tmp_path: Path) -> None:
    put(tmp_path, "known", meta={**META, "lineage": "0123456789abcdef"})
    put(tmp_path, "older")
    told = replace(served(tmp_path), adapters={"own": "unused"}, lineages={"own": "fedcba9876543210"})

    async def work() -> None:
        app = build_api(HoldingEngine(), told, max_tokens=5)
        async with life(app):
            listed = (await call(app, "/v1/models")).json["data"]
            found = {card["id"]: card["lineage"] for card in listed}
            assert found == {
                "small": None,
                "own": "fedcba9876543210",
                "small:known": "0123456789abcdef",
                "small:older": None,
            }
            one = await call(app, "/v1/models/small:known")
            assert one.json["lineage"] == "0123456789abcdef"

    asyncio.run(work())


def test_adapters_appear_change_and_go_within_the_time_of_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "POLL_S", 0.02)

    async def until(condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def work() -> None:
        engine = HoldingEngine()
        catalog = AdapterCache(engine, served(tmp_path))
        await catalog.start()
        assert catalog.model_ids() == ["small"]
        assert await catalog.prepare("small") is None
        first = put(tmp_path, "polite")
        await until(lambda: catalog.model_ids() == ["small", "small:polite"])
        assert await catalog.prepare("small:polite") == first
        second = put(tmp_path, "polite", "anew")
        await until(lambda: first not in engine.held)
        assert await catalog.prepare("small:polite") == second
        put(tmp_path, "foreign", meta={**META, "base": "other/small"})
        put(tmp_path, "older", meta={**META, "revision": "abc"})
        put(tmp_path, "rude")
        await until(lambda: "small:rude" in catalog.model_ids())
        assert catalog.model_ids() == [
            "small",
            "small:polite",
            "small:rude",
        ]  # not of this base, or not of this revision
        remove(registry_of(str(tmp_path), "org/small"), "polite")
        await until(lambda: engine.held == {})
        with pytest.raises(RequestError) as gone:
            await catalog.prepare("small:polite")
        assert gone.value.code == "model_not_found"
        await catalog.stop()

    asyncio.run(work())


def test_the_least_recently_used_is_unloaded_and_every_reply_is_its_adapters_own(tmp_path: Path) -> None:
    names = [f"a{i:02d}" for i in range(12)]
    for name in names:
        put(tmp_path, name)

    async def work() -> None:
        engine = HoldingEngine()
        catalog = AdapterCache(engine, served(tmp_path, 4))
        await catalog.start()

        async def use(name: str) -> None:
            key = await catalog.prepare(f"small:{name}")
            assert engine.held[key or ""] == name

        for name in ["a00", "a01", "a02", "a03", "a00", "a04", "a00"]:
            await use(name)
        assert sorted(engine.held.values()) == ["a00", "a02", "a03", "a04"]
        assert engine.loads == ["a00", "a01", "a02", "a03", "a04"]
        await asyncio.gather(*[use(names[(7 * i) % 12]) for i in range(200)])
        assert len(engine.held) == 4
        engine.loads.clear()
        await asyncio.gather(*[use("a09") for _ in range(20)])
        assert engine.loads in ([], ["a09"])  # twenty that come at once load it once
        await catalog.stop()

    asyncio.run(work())


def test_damage_and_misfits_are_a_503_that_names_no_path(tmp_path: Path) -> None:
    damaged = put(tmp_path, "damaged")
    Path(damaged, "adapter_config.json").write_text("{}")
    put(tmp_path, "misfit", poison=True)

    async def work() -> None:
        engine = HoldingEngine()
        app = build_api(engine, served(tmp_path), max_tokens=5)
        async with life(app):
            for model in ("small:damaged", "small:misfit"):
                answer = await call(app, "/v1/completions", {"model": model, "prompt": "x"})
                assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
                assert str(tmp_path) not in answer.error["message"]
                assert answer.error["message"].startswith(f"the model {model} cannot be served: ")
                assert "try again" not in answer.error["message"]
                assert "retry-after" not in answer.headers
            answer = await call(app, "/v1/completions", {"model": "small", "prompt": "x"})
            assert answer.json["choices"][0]["text"] == "base"

    asyncio.run(work())


class life:  # noqa: N801 - a context manager
    """An app's lifespan."""

    def __init__(self, app: Any) -> None:
        self.app, self.inbox, self.sent = app, asyncio.Queue[Any](), asyncio.Queue[Any]()

    async def __aenter__(self) -> None:
        self.task = asyncio.create_task(self.app({"type": "lifespan", "asgi": {}}, self.inbox.get, self.sent.put))
        await self.inbox.put({"type": "lifespan.startup"})
        assert (await self.sent.get())["type"] == "lifespan.startup.complete"

    async def __aexit__(self, *_: Any) -> None:
        await self.inbox.put({"type": "lifespan.shutdown"})
        await self.task


def test_what_a_client_calls_a_model_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "polite")
    asked: list[str] = []
    monkeypatch.setattr(catalog_module, "local_adapter", lambda uri, sums: asked.append(uri) or Path(uri))
    evil = [
        "small:../polite",
        "small:polite/../polite",
        "polite",
        "small:",
        ":polite",
        f"small:{tmp_path}",
        "small:polite\0",
    ]
    evil += ["../../etc/passwd", "small:polite/0001", "SMALL:polite", "small:polite ", "s3://x/y", "small:%2e%2e"]

    async def work() -> None:
        app = build_api(HoldingEngine(), served(tmp_path), max_tokens=5)
        async with life(app):
            for model in evil:
                answer = await call(app, "/v1/completions", {"model": model, "prompt": "x"})
                assert (answer.status, answer.error["code"]) == (404, "model_not_found"), model
            assert asked == []
            answer = await call(app, "/v1/completions", {"model": "small:polite", "prompt": "x"})
            assert answer.json["choices"][0]["text"] == "polite"
            listed = await call(app, "/v1/models")
            assert [card["id"] for card in listed.json["data"]] == ["small", "small:polite"]
            assert (await call(app, "/v1/models/small:polite")).json["id"] == "small:polite"

    asyncio.run(work())
