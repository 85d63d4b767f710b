"""Streams outlive what happens to replicas: scaling, rolling updates, adapters that come and go, and sudden deaths.

The engine is a fake that keeps time, so that streams have a known length; all else is what serves a real model.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from ray import serve

from bench.fake_engine import APP, start_fake
from ftray import config
from ftray.serve import proxy
from ftray.serve.registry import registry_of, remove
from tests.cluster import local_ray
from tests.unit.test_adapter_cache import put, served

pytestmark = pytest.mark.long
DEADLINE_S = 180.0
PORT = 8127


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        patch.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        for name in proxy.SETTINGS:
            patch.delenv(name, raising=False)
        proxy.announce()
        with local_ray():
            yield
            serve.shutdown()
        for name in proxy.SETTINGS:
            del os.environ[name]


def settings(**change: Any) -> config.ServeConfig:
    usual: dict[str, Any] = {
        "upscale_delay_s": 1,
        "downscale_delay_s": 2,
        "max_answer_s": 60,
        "max_queued_requests": 200,
    }
    return config.ServeConfig(**{**usual, **change})


@dataclass
class Clients:
    """Streams that begin every so often, each read to its end, in a thread of their own."""

    url: str
    every_s: float
    num_tokens: int
    model: str = "fake"
    ends: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    begun: int = 0  # streams whose first word came

    def __enter__(self) -> Clients:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.no_more()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "a stream hangs"

    def no_more(self) -> None:
        """What runs is read to its end."""
        self._stopping.set()

    async def _work(self) -> None:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            while not self._stopping.is_set():
                group.create_task(self._one(session))
                await asyncio.sleep(self.every_s)

    async def _one(self, session: aiohttp.ClientSession) -> None:
        end, words = await stream(session, self.url, self.model, self.num_tokens, self._has_begun)
        self.ends.append(end)
        self.words += words[:1]

    def _has_begun(self) -> None:
        self.begun += 1


async def stream(
    session: aiohttp.ClientSession, url: str, model: str, num_tokens: int, on_first: Callable[[], None] = lambda: None
) -> tuple[str, list[str]]:
    """How a stream ended (`whole`: all tokens, its usage and [DONE]), and its words."""
    body = {"model": model, "prompt": "x", "max_tokens": num_tokens, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    words: list[str] = []
    usage: Any = None
    try:
        async with session.post(f"{url}/completions", json=body) as response:
            if response.status != 200:
                assert response.content_type == "application/json"
                return f"{response.status} {(await response.json())['error']['code']}", words
            async for line in response.content:
                if line == b"data: [DONE]\n":
                    right = usage is not None and usage["completion_tokens"] == len(words) == num_tokens
                    return ("whole" if right else "cut, but [DONE]"), words
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return f"error {event['error']['code']}", words
                    usage = event.get("usage") or usage
                    first = not words
                    words += [choice["text"].strip() for choice in event["choices"]]
                    if first and words:
                        on_first()
    except aiohttp.ClientError as err:
        return f"broken {type(err).__name__}", words
    return "silence", words


def one(url: str, model: str = "fake", num_tokens: int = 2) -> tuple[str, list[str]]:
    async def ask() -> tuple[str, list[str]]:
        async with aiohttp.ClientSession() as session:
            return await stream(session, url, model, num_tokens)

    return asyncio.run(ask())


def num_replicas(state: str = "RUNNING") -> int:
    deployment = serve.status().applications[APP].deployments["model"]
    return int(deployment.replica_states.get(state, 0))


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.2)


def only_replica(count: int) -> Callable[[], bool]:
    return lambda: num_replicas() == count and num_replicas("STOPPING") == num_replicas("STARTING") == 0


def test_scaling_up_and_down_and_a_rolling_update_cut_no_stream(cluster: None) -> None:
    cfg = settings(max_replicas=3, target_ongoing_requests=4)
    url = start_fake(cfg, port=PORT, tokens_per_s=10)
    with Clients(url, every_s=0.4, num_tokens=60) as clients:  # 15 at a time, where a replica wants 4
        until(lambda: num_replicas() == 3, "three replicas")
    assert set(clients.ends) == {"whole"}
    assert len(clients.ends) > 15
    with Clients(
        url, every_s=3, num_tokens=60
    ) as few:  # two at a time: one replica is enough, and the others answer yet
        until(only_replica(1), "one replica")
        start_fake(cfg, port=PORT, tokens_per_s=11)  # other settings: the replica is replaced under its streams
        until(only_replica(1), "the new replica alone")
        assert one(url)[0] == "whole"
    assert set(few.ends) == {"whole"}


def test_adapters_that_come_and_go_cut_no_stream(cluster: None, tmp_path: Path) -> None:
    url = start_fake(settings(target_ongoing_requests=8), served(tmp_path, 2), port=PORT, tokens_per_s=10)
    put(tmp_path, "a", "first")
    until(lambda: one(url, "small:a")[0] == "whole", "the adapter")
    with Clients(url, every_s=0.5, num_tokens=30, model="small:a") as clients:
        until(lambda: len(clients.ends) > 2, "streams")
        put(tmp_path, "a", "second")
        until(lambda: one(url, "small:a")[1][:1] == ["second"], "its new version")
        put(tmp_path, "b", "other")
        until(lambda: one(url, "small:b")[1][:1] == ["other"], "the other adapter")
        num_before = len(clients.ends)
        until(lambda: len(clients.ends) > num_before + 2, "streams of the new version")
        remove(registry_of(str(tmp_path), "org/small"), "a")
        until(lambda: one(url, "small:a")[0] == "404 model_not_found", "its removal")
        clients.no_more()
    assert set(clients.ends) - {"404 model_not_found"} == {"whole"}
    assert set(clients.words) == {"first", "second"}


def test_a_replica_that_is_killed_ends_its_streams_with_an_error_event_and_is_replaced(cluster: None) -> None:
    url = start_fake(settings(target_ongoing_requests=8), port=PORT, tokens_per_s=10)
    handle = serve.get_app_handle(APP)
    pid = handle.pid.remote().result(timeout_s=DEADLINE_S)
    with Clients(url, every_s=0.3, num_tokens=100) as clients:
        until(lambda: clients.begun > 2, "streams")
        os.kill(pid, signal.SIGKILL)
        until(lambda: len(clients.ends) > 3, "ends")
        until(lambda: one(url)[0] == "whole", "a new replica")
        clients.no_more()
    ended = set(clients.ends)
    assert "error engine_unavailable" in ended
    assert ended <= {"whole", "error engine_unavailable", "503 engine_unavailable", "503 overloaded"}


def test_replicas_go_to_zero_and_come_back_for_the_next_request(cluster: None) -> None:
    url = start_fake(settings(min_replicas=0, target_ongoing_requests=8), port=PORT, tokens_per_s=20)
    assert one(url)[0] == "whole"
    until(only_replica(0), "none")
    assert one(url)[0] == "whole"


def test_late_first_texts_add_a_replica_though_few_requests_run(cluster: None) -> None:
    cfg = settings(max_replicas=2, target_ongoing_requests=50, target_first_token_s=0.2)
    url = start_fake(cfg, port=PORT, tokens_per_s=20, delay_s=1)
    with Clients(url, every_s=0.5, num_tokens=2) as clients:
        until(lambda: num_replicas() == 2, "the second replica")
    assert set(clients.ends) == {"whole"}
