"""Hostile input: whatever a body, a header or a path holds, the answer is one that the API's description knows."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ftray import config
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.auth import answer_id
from ftray.serve.routes import build_api
from tests.unit.test_adapter_cache import life, put, served
from tests.unit.test_serve_policies import Explaining
from tests.unit.test_serve_protocol import CHAT, TEXT, PaperEngine, call

NUM_BODIES = 5000
CALL = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
SCRAPS: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 1e308, 0.5, "", "x", "\x00", "🐦", "\ud7ff", "../../etc/passwd",
    "small:../polite", "x" * 3000, [], {}, [[]], [None], ["a", 1], {"a": {"b": [1]}}, [{"role": "user"}], {"type": "text"},
    [{"role": "user", "content": "x"}], [{"role": "system", "content": [{"type": "text", "text": "t"}]}], "{{ 7 * 7 }}",
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "required",
    [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [CALL]}],
    [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}],
]  # fmt: skip
KEYS = [
    "model", "messages", "prompt", "n", "stop", "seed", "stream", "stream_options", "temperature", "top_p", "max_tokens",
    "max_completion_tokens", "logprobs", "top_logprobs", "user", "tools", "chat_template", "response_format", "rating",
    "__class__", "", "logit_bias", "best_of", "echo", "id", "comment", "tool_choice", "parallel_tool_calls", "top_k", "min_p",
    "chat_template_kwargs", "reasoning_effort", "input", "instructions", "text", "reasoning",
]  # fmt: skip


def spoil(rng: random.Random, body: dict[str, Any]) -> bytes:
    """A valid body with something wrong, or many things."""
    tree = dict(body)
    for _ in range(rng.randint(1, 3)):
        tree[rng.choice(KEYS)] = rng.choice(SCRAPS)
    raw = json.dumps(tree).encode()
    way = rng.random()
    if way < 0.1:
        return raw[: rng.randrange(len(raw))]
    if way < 0.2:
        at = rng.randrange(len(raw))
        return raw[:at] + rng.randbytes(3) + raw[at:]
    if way < 0.23:
        return b"[" * rng.choice([10, 500, 50_000]) + raw
    return raw


def test_five_thousand_spoiled_bodies_are_answered_or_refused(tmp_path: Path) -> None:
    rng, seen = random.Random(7), Counter[int]()
    turns = [*CHAT["messages"], {"role": "assistant", "content": "y"}]  # type: ignore[misc]
    talk = {"rating": "up", "messages": turns, "id": answer_id("chatcmpl", "")}
    bodies = {
        "/v1/chat/completions": CHAT,
        "/v1/completions": TEXT,
        "/v1/responses": {"model": "m", "input": "hi"},
        "/v1/feedback": talk,
    }

    async def work() -> None:
        bounds = config.FeedbackConfig(records_per_day=10_000)
        app = build_api(PaperEngine(), ServedModels("m"), max_tokens=50, place=str(tmp_path / "place"), feedback=bounds)
        for _ in range(NUM_BODIES):
            path = rng.choice(list(bodies))
            body = spoil(rng, bodies[path])  # type: ignore[arg-type]
            answer = await call(app, path, body, method="POST")
            seen[answer.status] += 1
            assert answer.status in (200, 201, 400, 403, 404), (path, body, answer.status)
            if answer.status >= 400:
                assert answer.error["message"]

    asyncio.run(work())
    assert seen[400] > NUM_BODIES / 2
    assert seen[200] > 30
    assert {p.name for p in tmp_path.iterdir()} == {"place"}
    assert {p.name for p in (tmp_path / "place").iterdir()} == {"feedback"}


@pytest.mark.long
def test_schemathesis_finds_no_answer_that_the_description_does_not_know(tmp_path: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    put(tmp_path, "polite")
    app = build_api(
        Explaining(), served(tmp_path), max_tokens=50, place=str(tmp_path), feedback=config.FeedbackConfig()
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in names]
    statuses: Counter[int] = Counter()
    for operation in schema.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        def check(case: Any) -> None:
            response = case.call()
            statuses[response.status_code] += 1
            case.validate_response(response, checks=checks)

        check()
    assert statuses[200] > 40, statuses
    assert statuses[400] + statuses[404] > 40, statuses


def test_a_body_that_only_looks_like_a_life_is_none(tmp_path: Path) -> None:
    """The app lives through hostile input: what comes after is answered."""

    async def work() -> None:
        app = build_api(PaperEngine(), ServedModels("m"), max_tokens=50)
        async with life(app):
            for path in (
                "/v1/models/%2e%2e",
                "/v1/models/" + "x" * 9000,
                "/%00",
                "/v1/../health",
                "//",
                "/v1/chat/completions/",
            ):
                assert (await call(app, path)).status == 404, path
            assert (await call(app, "/v1/completions", TEXT)).status == 200

    asyncio.run(work())
