"""An engine that computes nothing and keeps time: so many tokens a second on each stream, behind Serve as a real one is.

What is measured against it, or done to its replicas, is the path's own doing. Adapters answer with their `reply`, a key
that their adapter_config.json has beside PEFT's.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ray import serve

from ftray import config
from ftray.engine.protocol import OutputChunk, SamplingParams
from ftray.errors import ModelError
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.app import QUIET, deployment_options
from ftray.serve.autoscaling import METRIC, TtftWindow
from ftray.serve.routes import build_api

TOKENS_PER_S = 30.0
APP = "ftray"


class FakeTokenizer:
    """Ids are characters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class FakeEngine:
    """Emits a token every 1/tokens_per_s s, after delay_s. Each is a word: when it was made, or the adapter's reply."""

    def __init__(self, tokens_per_s: float = TOKENS_PER_S, delay_s: float = 0.0) -> None:
        self.tokenizer, self.max_context = FakeTokenizer(), 1 << 20
        self._every_s, self._delay_s = 1 / tokens_per_s, delay_s
        self._replies: dict[str, str] = {}

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def health(self) -> None: ...

    async def load_adapter(self, name: str, directory: str) -> None:
        self._replies[name] = json.loads(Path(directory, "adapter_config.json").read_text())["reply"]

    async def unload_adapter(self, name: str) -> None:
        self._replies.pop(name, None)

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> AsyncGenerator[OutputChunk, None]:
        if adapter is not None and adapter not in self._replies:
            raise ModelError(f"the adapter {adapter} is not loaded")
        return self._generate(len(prompt_ids), params.max_tokens, self._replies[adapter] if adapter else None)

    async def _generate(
        self, num_prompt_tokens: int, num_tokens: int, word: str | None
    ) -> AsyncGenerator[OutputChunk, None]:
        begin = time.monotonic() + self._delay_s
        for i in range(num_tokens):
            await asyncio.sleep(begin + i * self._every_s - time.monotonic())
            last = "length" if i == num_tokens - 1 else None
            text = f"{word or format(time.time(), '.6f')} "
            yield OutputChunk(text, [i], last, num_prompt_tokens, i + 1)  # type: ignore[arg-type]


@serve.ingress()
class FakeReplica:
    """Our API around the fake engine, as ModelReplica is around a real one."""

    def __init__(self, served: ServedModels, engine: dict[str, float]) -> None:
        self._served, self._engine, self._first_times = served, engine, TtftWindow()

    def __serve_build_asgi_app__(self) -> Any:
        engine: Any = FakeEngine(**self._engine)
        return build_api(engine, self._served, max_tokens=10_000, first_times=self._first_times)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {METRIC: self._first_times.median()}

    def pid(self) -> int:
        """For whoever wants to kill it."""
        return os.getpid()


def start_fake(
    serve_cfg: config.ServeConfig, served: ServedModels | None = None, *, port: int = 8123, **engine: float
) -> str:
    """Deploys it as a model is deployed, or other settings in place of those before; returns the address."""
    deployment = serve.deployment(FakeReplica, name="model", **deployment_options(serve_cfg, num_cpus=0))
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET)
    serve.run(deployment.bind(served or ServedModels("fake"), engine), name=APP, route_prefix="/")
    return f"http://127.0.0.1:{port}/v1"
