"""What the proxy says where replicas can't, and how many replicas late first texts ask for. No Ray runs here."""

import asyncio
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftray.serve import autoscaling
from ftray.serve import proxy as edge

STREAM = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def plain(status: int, *headers: tuple[bytes, bytes]) -> list[dict[str, Any]]:
    """As Serve's proxy refuses."""
    start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain"), *headers]}
    return [start, part(b"Request dropped: model/replica#abc", True), part(b"", False)]


def through(messages: list[dict[str, Any]], path: str = "/v1/models") -> list[dict[str, Any]]:
    """What the client gets where the proxy sent this and then had no more to say."""
    sent: list[dict[str, Any]] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(edge.ProxyMiddleware(proxy)({"type": "http", "path": path}, None, send))
    return sent


def read(sent: list[dict[str, Any]]) -> tuple[int, dict[bytes, bytes], Any]:
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(b"".join(m["body"] for m in sent[1:]))["error"]


@pytest.mark.parametrize(
    ("messages", "status", "code", "retry_after"),
    [
        (plain(503, (b"retry-after", b"3")), 503, "overloaded", b"3"),
        (plain(503), 503, "overloaded", b"1"),
        (plain(429), 429, "overloaded", b"1"),
        (plain(500), 503, "engine_unavailable", b"1"),
        (plain(404), 404, None, None),
        ([], 503, "engine_unavailable", b"1"),  # the replica died before it said a word
    ],
)
def test_serves_own_refusals_have_openais_shape(
    messages: list[dict[str, Any]], status: int, code: str | None, retry_after: bytes | None
) -> None:
    told, headers, error = read(through(messages))
    assert (told, error["code"], headers.get(b"retry-after")) == (status, code, retry_after)
    assert headers[b"content-type"] == b"application/json"
    assert "replica#" not in json.dumps(error)


def test_a_stream_that_breaks_off_ends_with_an_error_event_and_without_done() -> None:
    first = part(b'data: {"choices":[]}\n\n', True)
    sent = through([STREAM, first])
    assert sent[:2] == [STREAM, first]
    assert sent[2]["more_body"] is False
    event = json.loads(sent[2]["body"].removeprefix(b"data: "))
    assert event["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize(
    "messages",
    [
        [STREAM, part(b"data: 1\n\n", True), part(b"data: [DONE]\n\n", False)],
        [
            {"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"application/json")]},
            part(b"{}", False),
        ],
        [
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]},
            part(b"x 1", False),
        ],
    ],
)
def test_what_replicas_say_passes_untouched(messages: list[dict[str, Any]]) -> None:
    assert through(messages) == messages


def test_serves_own_paths_stay_as_they_are() -> None:
    assert through(plain(503), "/-/healthz") == plain(503)


def test_a_ray_that_is_started_takes_the_edge_in_unless_another_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    for name in edge.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    edge.announce()
    found = {name: os.environ.pop(name) for name in edge.SETTINGS}
    module, _, function = found[path].partition(":")
    assert (module, function) == (edge.__name__, edge.middlewares.__name__)
    assert found == edge.SETTINGS
    for name in edge.SETTINGS:
        monkeypatch.setenv(name, "mine:own")
    edge.announce()
    assert {os.environ[name] for name in edge.SETTINGS} == {"mine:own"}


def test_images_and_instructions_set_what_ray_has_to_know() -> None:
    root = Path(__file__).parents[2]
    for page in ("cluster/Dockerfile", "docs/clusters.md"):
        text = (root / page).read_text()
        assert [name for name, value in edge.SETTINGS.items() if f"{name}={value}" not in text] == [], page


def test_serve_knows_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes no notice of a variable that it doesn't know, and would quietly serve at twice the cost."""
    from ray.serve._private import constants

    for name, value in edge.SETTINGS.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("constants_again", constants.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.RAY_SERVE_PROXY_USE_GRPC is True
    assert again.RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH == 2**31 - 1
    assert again.RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH == "ftray.serve.proxy:middlewares"


def wanted(running: int, requests: float, **first_s: float) -> float:
    """Replicas for so many requests at 10 a replica, with a target of 1 s to the first text."""
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 10.0, get_upscaling_factor=lambda: 1.0)
    context = SimpleNamespace(
        current_num_replicas=running,
        target_num_replicas=running,
        total_num_requests=requests,
        policy_state={},
        config=config,
        aggregated_metrics={autoscaling.METRIC: first_s},
    )
    return autoscaling.TtftPolicy(target_s=1.0)(context)[0]


def test_late_first_texts_ask_for_replicas_and_quick_ones_change_nothing() -> None:
    assert wanted(2, 40, a=0.1, b=0.1) == 4  # by requests alone
    assert wanted(2, 2, a=0.1, b=0.3) == pytest.approx(0.2)
    assert wanted(2, 2, a=1.4, b=1.6) == pytest.approx(3)  # half as many more
    assert wanted(2, 2, a=9, b=11) == 4  # at most twice as many at a time
    assert wanted(2, 60, a=9, b=11) == 6  # unless requests want more yet
    assert wanted(2, 2, a=0.9, b=0.5) == 2  # in time, but only just: none goes
    assert wanted(2, 2, a=0, b=0) == pytest.approx(0.2)  # nobody asked
    assert wanted(0, 1) == 1


def test_the_median_time_to_first_text_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(autoscaling, "time", SimpleNamespace(monotonic=lambda: now))
    times = autoscaling.TtftWindow()
    assert times.median() == 0
    times.add(5.0)
    now += autoscaling.WINDOW_S - 1
    times.add(1.0)
    assert times.median() == 3
    now += 2
    assert times.median() == 1
    now += autoscaling.WINDOW_S
    assert times.median() == 0
