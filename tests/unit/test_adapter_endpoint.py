"""A whole replica in this process, under the official client: adapters come, cycle through few places and go under load."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import save_file

from ftray import storage
from ftray.config import ServeConfig
from ftray.engine.adapters import CONFIG_FILE, WEIGHTS_FILE
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.app import build_app
from ftray.serve.registry import publish, registry_of, remove
from tests.e2e.test_chat_page import serving
from tests.unit.test_adapters import of_peft, write_adapter
from tests.unit.test_engine import by_generate, byte_tokenizer, make_prompts, tiny_model

META = {"base": "tiny", "revision": None, "run": "r", "step": 1}
NUM_TOKENS = 12
TIED = 1e-3  # two best logits as near as this may change places when other rows share the batch


def put_adapter(root: Path, name: str, seed: int) -> Path:
    """Publishes a random adapter of the tiny model; returns where PEFT finds it."""
    directory = write_adapter(root / "made" / name, seed)
    (directory / "README.md").unlink(missing_ok=True)
    assert storage.commit_directory(directory, str(directory), {})
    publish(registry_of(str(root), "tiny"), name, str(directory), str(root / "tiny"), META)
    return directory


def endpoint_of(root: Path, max_adapters: int) -> Any:
    """The ASGI app of a replica, built as Serve builds it."""
    model = tiny_model()
    model.save_pretrained(root / "tiny")
    byte_tokenizer().save_pretrained(root / "tiny")
    served = ServedModels("tiny", {}, registry_of(str(root), "tiny"), "tiny", None, max_adapters)
    cfg = ServeConfig(target_ongoing_requests=4)
    app = build_app(str(root / "tiny"), served, cfg, dtype="float32", place=str(root / "runs/r"))
    deployment = app._bound_deployment
    (settings,) = deployment.init_args
    replica = deployment.func_or_class.__mro__[1]  # without what Serve wraps around it
    return replica(settings).__serve_build_asgi_app__()


async def until_listed(client: openai.AsyncOpenAI, name: str, there: bool = True) -> float:
    """Seconds until a model appears, or is gone."""
    begin = time.monotonic()
    while (name in [model.id async for model in client.models.list()]) != there:
        assert time.monotonic() - begin < 300
        await asyncio.sleep(0.05)
    return time.monotonic() - begin


def least_gap(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """Least distance of the two best logits on the way of a greedy answer."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def cycle(root: Path, num_adapters: int, max_adapters: int, num_requests: int) -> None:
    """Random models for random prompts, some streamed; adapters published and removed meanwhile. Every answer is right."""
    prompts = [prompt for prompt in make_prompts(6) if max(prompt) < 256]
    app = endpoint_of(root, max_adapters)
    made = {f"a{i:02d}": put_adapter(root, f"a{i:02d}", i) for i in range(num_adapters)}
    expected: dict[tuple[str | None, int], list[int]] = {}
    for name in (None, *made):
        model = of_peft(made[name] if name else None)
        for i, prompt in enumerate(prompts):
            tokens = by_generate(model, prompt, NUM_TOKENS)
            if least_gap(model, prompt, tokens) > TIED:
                expected[name, i] = tokens
    assert len(expected) > 0.9 * len(prompts) * (1 + num_adapters)
    decode = byte_tokenizer().decode
    rng = random.Random(3)

    async def work(url: str) -> None:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        room = asyncio.Semaphore(6)

        async def ask(name: str | None, i: int, stream: bool) -> None:
            async with room:
                how: Any = {"model": f"tiny:{name}" if name else "tiny", "prompt": prompts[i], "max_tokens": NUM_TOKENS}
                if stream:
                    chunks = [c async for c in await client.completions.create(**how, temperature=0, stream=True)]
                    text = "".join(chunk.choices[0].text for chunk in chunks)
                else:
                    text = (await client.completions.create(**how, temperature=0)).choices[0].text
                wanted = str(decode(expected[name, i], skip_special_tokens=True)).rstrip("�")
                assert text == wanted, (name, i)

        await until_listed(client, f"tiny:{max(made)}")
        known = list(expected)
        asked = [ask(*rng.choice(known), rng.random() < 0.5) for _ in range(num_requests)]
        load = asyncio.gather(*asked)
        await asyncio.to_thread(put_adapter, root, "late", 999)
        await until_listed(client, "tiny:late")
        late: Any = {"model": "tiny:late", "prompt": prompts[0], "max_tokens": NUM_TOKENS, "temperature": 0}
        text = (await client.completions.create(**late)).choices[0].text
        wanted = by_generate(of_peft(root / "made/late"), prompts[0], NUM_TOKENS)
        assert text == str(decode(wanted, skip_special_tokens=True)).rstrip("�")
        remove(registry_of(str(root), "tiny"), "late")
        await until_listed(client, "tiny:late", there=False)
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(**late)
        await load

    with serving(app) as url:
        asyncio.run(work(url))


def test_adapters_cycle_through_few_places_without_a_wrong_answer(tmp_path: Path) -> None:
    cycle(tmp_path, num_adapters=5, max_adapters=2, num_requests=40)


@pytest.mark.long
def test_fifty_adapters_cycle_through_eight_places(tmp_path: Path) -> None:
    cycle(tmp_path, num_adapters=50, max_adapters=8, num_requests=1000)


def test_a_poisoned_adapter_harms_nobody_else(tmp_path: Path) -> None:
    """Weights that are whole and fit, but are no numbers: 503 for it, answers for the others."""
    app = endpoint_of(tmp_path, 2)
    source = write_adapter(tmp_path / "bad", 1)
    (source / "README.md").unlink(missing_ok=True)
    settings = json.loads((source / CONFIG_FILE).read_text())
    rank = settings["r"]
    names = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"}
    tensors = {name: torch.full((rank, 64) if "lora_A" in name else (64, rank), float("inf")) for name in names}
    save_file(tensors, source / WEIGHTS_FILE)
    assert storage.commit_directory(source, str(source), {})
    publish(registry_of(str(tmp_path), "tiny"), "bad", str(source), str(tmp_path / "tiny"), META)
    with serving(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="tiny:bad", prompt="x", max_tokens=2)
        assert refused.value.status_code == 503
        assert client.completions.create(model="tiny", prompt="x", max_tokens=2).usage is not None
