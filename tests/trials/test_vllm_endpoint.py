"""`serve.engine: vllm` on Ray Serve, under the official client, tried by hand where vLLM is installed (see test_vllm)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from peft import PeftModel

from ftray import storage
from ftray.config import ServeConfig
from ftray.serve import proxy
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.registry import publish, registry_of, remove
from ftray.serve.run import Endpoint, start_endpoint
from tests.cluster import local_ray
from tests.trials.test_vllm import NUM_TOKENS, QUESTIONS, adapters, base, load, prompts  # noqa: F401 - fixtures
from tests.unit.test_engine import by_generate

pytest.importorskip("vllm")
META = {"base": "small", "revision": None, "run": "r", "step": 1}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    return registry_of(str(tmp_path_factory.mktemp("storage")), "small")


@pytest.fixture(scope="module")
def endpoint(base: Path, registry: str) -> Iterator[Endpoint]:  # noqa: F811
    proxy.announce()
    with local_ray():
        cfg = ServeConfig(port=0, engine="vllm", target_ongoing_requests=4, max_adapters=2, max_tokens=900)
        served = ServedModels("small", {}, registry, "small", None, 2)
        made = start_endpoint(base, served, cfg, dtype="float32", max_context=1024, num_cpus=2)
        yield made
        made.stop()


def test_chats_adapters_schemas_and_leaving(
    endpoint: Endpoint,
    registry: str,
    base: Path,  # noqa: F811
    adapters: dict[str | None, Path],  # noqa: F811
    prompts: list[list[int]],  # noqa: F811
) -> None:
    client = openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0, timeout=300)
    greedy: Any = {"max_tokens": NUM_TOKENS, "temperature": 0}
    messages: Any = [{"role": "user", "content": QUESTIONS[0]}]
    plain = client.chat.completions.create(model="small", messages=messages, **greedy)
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == len(prompts[0])
    streamed = client.chat.completions.create(model="small", messages=messages, stream=True, **greedy)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == plain.choices[0].message.content
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    source = adapters["a"]
    assert source is not None
    for extra in source.glob("*.md"):
        extra.unlink()
    assert storage.commit_directory(source, str(source), {})
    began = time.monotonic()
    publish(registry, "a", str(source), str(base), META)
    while "small:a" not in [model.id for model in client.models.list()]:
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    tuned = client.chat.completions.create(model="small:a", messages=messages, **greedy)
    expected = by_generate(PeftModel.from_pretrained(load(base), source).eval(), prompts[0], NUM_TOKENS, [2])
    assert tuned.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert tuned.choices[0].message.content != plain.choices[0].message.content

    several: Any = {"n": 2, "seed": 3, "temperature": 1.2, "logprobs": True, "top_logprobs": 2, "max_tokens": 5}
    both = client.chat.completions.create(model="small", messages=messages, **several)
    assert len({choice.message.content for choice in both.choices}) == 2
    assert both.choices[0].logprobs is not None
    schema: Any = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="small:a", messages=messages, response_format=form, **greedy)
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)

    async def leave_and_ask() -> None:
        eager = openai.AsyncOpenAI(base_url=endpoint.url, api_key="none", max_retries=0, timeout=300)
        long: Any = {"model": "small", "prompt": "x", "max_tokens": 900, "temperature": 1.5, "stream": True}
        streams = [await eager.completions.create(**long) for _ in range(6)]  # all places are taken
        for stream in streams:
            await anext(aiter(stream))
            await stream.close()
        await eager.completions.create(model="small", prompt="x", max_tokens=1)

    asyncio.run(leave_and_ask())
    remove(registry, "a")
    while "small:a" in [model.id for model in client.models.list()]:
        time.sleep(0.1)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="small:a", messages=messages, **greedy)
