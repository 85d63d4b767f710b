"""Attacker: an API client, with a key or without one.

Whatever bytes come, the answer is one that OpenAI's clients understand, with a 4xx status; nothing raises, nothing grows
without a bound, and no key reaches another's answers.
"""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvicorn.protocols.http.auto
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from ftray import storage
from ftray.compat.uvicorn import uvicorn_with_bounded_headers
from ftray.config import FeedbackConfig, ServeConfig
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.asgi import read_body
from ftray.serve.auth import answer_id, hash_key, is_answer_of, key_id
from ftray.serve.openai import encode_json
from ftray.serve.proxy import ProxyMiddleware
from ftray.serve.routes import build_api
from ftray.serve.routing import Router
from ftray.storage import strict_json
from tests.unit.test_serve_policies import TALK
from tests.unit.test_serve_protocol import CHAT, HI, TEXT, PaperEngine, call

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/feedback", "/v1/responses"]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["m", "user", "text"]),
    lambda below: (
        st.lists(below, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=8), below, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "n", "stop", "seed", "stream", "stream_options", "temperature", "top_p", "user", "logprobs",
     "top_logprobs", "max_tokens", "max_completion_tokens", "response_format", "safety_identifier", "rating", "comment", "id",
     "correction", "tools", "tool_choice", "chat_template_kwargs", "logit_bias", "echo", "input", "text", "metadata", "\ud800"]
)  # fmt: skip


def ask_all(body: bytes, **headers: str) -> None:
    """Sends one body everywhere; asserts that each answer is a good one, or an error in OpenAI's shape."""

    async def work() -> None:
        router = Router({"m": 1.0})  # with shares, `user` is hashed
        for path in PATHS:
            app = build_api(
                PaperEngine(),
                ServedModels("m"),
                max_tokens=50,
                router=router,
                place="/dev/null/x",
                feedback=FeedbackConfig(),
            )
            answer = await call(app, path, body, method="POST", headers=headers)
            # 503: feedback that was good, whose place can't be written
            assert answer.status in (200, 400, 403, 404, 413) or (answer.status, path) == (503, PATHS[2]), (path, body)
            if answer.status >= 400:
                assert answer.error["message"]
                assert len(answer.error["message"]) < 2000

    asyncio.run(work())


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_answered_or_refused(body: bytes) -> None:
    ask_all(body)


@QUICK
@given(JSON)
def test_any_json_is_answered_or_refused(tree: Any) -> None:
    ask_all(json.dumps(tree).encode())


@QUICK
@given(
    st.sampled_from([CHAT, TEXT, {"model": "m", "input": "x"}, {"rating": "up", "messages": TALK, "id": "x"}]),
    FIELDS,
    JSON,
)
def test_a_good_body_with_one_field_of_anything_is_answered_or_refused(
    body: dict[str, Any], field: str, value: Any
) -> None:
    ask_all(json.dumps({**body, field: value}).encode())


def schema(**what: Any) -> dict[str, Any]:
    return {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": what}}}


DEEP = '{"a":' * 3000 + "1" + "}" * 3000
BODIES = {
    "nested arrays": b"[" * 500_000,
    "nested objects": DEEP.encode(),
    "nested in a field": b'{"model": "m", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested in a schema": json.dumps(schema()).encode().replace(b'"schema": {}', f'"schema": {DEEP}'.encode()),
    "a number of 100,000 digits": b'{"model": "m", "prompt": "x", "max_tokens": ' + b"9" * 100_000 + b"}",
    "a number of 300 digits": b'{"model": "m", "prompt": "x", "max_tokens": ' + b"9" * 300 + b"}",
    "a token of 300 digits": b'{"model": "m", "prompt": [' + b"9" * 300 + b"]}",
    "an endless number": b'{"model": "m", "prompt": "x", "temperature": 1e999}',
    "a schema with an endless number": json.dumps(schema(minItems=1))
    .encode()
    .replace(b'"minItems": 1', b'"minItems": 1e999'),
    "a schema with a huge number": json.dumps(schema(minItems=1))
    .encode()
    .replace(b'"minItems": 1', b'"minItems": 1e308'),
    "NaN": b'{"model": "m", "prompt": "x", "temperature": NaN}',
    "a key twice": b'{"model": "m", "prompt": "x", "prompt": "y"}',
    "half a pair as a model": b'{"model": "\\ud800", "prompt": "x"}',
    "half a pair as a user": b'{"model": "default", "prompt": "x", "user": "\\udfff"}',
    "half a pair as a field": b'{"model": "m", "prompt": "x", "\\ud800": 1}',
    "half a pair in a schema": json.dumps(schema(title="x")).encode().replace(b'"title"', b'"\\ud800"'),
    "UTF-16": json.dumps(TEXT).encode("utf-16"),
    "a mark before it": b"\xef\xbb\xbf" + json.dumps(TEXT).encode(),
    "nothing": b"",
    "null": b"null",
    "a text": b'"x"',
    "two documents": b"{}{}",
    "a comment": b'{"model": "m" /* x */}',
    "NUL": b'{"model": "m\\u0000", "prompt": "x"}',
    "300 messages": json.dumps({"model": "m", "messages": HI * 300}).encode(),
    "a role of others": json.dumps({"model": "m", "messages": [{"role": "tool", "content": "x"}]}).encode(),
    "parts of parts": json.dumps({"model": "m", "messages": [{"role": "user", "content": [[["x"]]]}]}).encode(),
    "too large": b" " * ((1 << 20) + 1),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_hostile_body_is_a_400_in_openais_shape(case: str, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        app = build_api(PaperEngine(), ServedModels("m"), max_tokens=50, router=Router({"m": 1.0}))
        for path in PATHS[:2]:
            answer = await call(app, path, BODIES[case], method="POST")
            assert answer.status in (400, 404, 413), path
            assert answer.error["type"] == "invalid_request_error"

    with caplog.at_level(logging.ERROR):
        asyncio.run(work())
    assert not caplog.records


@pytest.mark.parametrize(
    "headers",
    [
        {"content-length": "²"},
        {"content-length": "-5"},
        {"content-length": "9" * 5000},
        {"host": "["},
        {"host": "\xff"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/nowhere", "/v1/models/[\udc80"])
def test_hostile_headers_and_paths_are_no_500(headers: dict[str, str], path: str) -> None:
    async def work() -> None:
        app = build_api(PaperEngine(), ServedModels("m"), max_tokens=50)
        answer = await call(app, path, b"{", method="POST", headers=headers)
        assert 400 <= answer.status < 500
        assert answer.error["message"]

    asyncio.run(work())


@pytest.mark.parametrize("length", [b"\xb2", b"\xb9\xb3", b"+5", b"1e9"])
def test_a_length_that_only_looks_like_a_number_is_none(length: bytes) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", length)]}
    assert asyncio.run(read_body(Request(scope, receive))) == b"x"


def test_what_is_not_utf8_stays_valid_json() -> None:
    assert json.loads(encode_json({"x": "\ud800é"})) == {"x": "\ud800é"}


# Keys


def websocket(app: Any, path: str, headers: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def work() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        await app(
            {**scope, "scheme": "ws", "root_path": "", "subprotocols": [], "client": None, "server": None},
            receive,
            send,
        )

    asyncio.run(work())
    return sent


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/health", "/nowhere"])
def test_a_websocket_is_closed_without_a_traceback(path: str, caplog: pytest.LogCaptureFixture) -> None:
    app = build_api(PaperEngine(), ServedModels("m"), max_tokens=5, key_hashes=(hash_key("k"),))
    with caplog.at_level(logging.ERROR):
        (closed,) = websocket(app, path, [])
        assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
        (closed,) = websocket(app, path, [(b"authorization", b"Bearer k")])
        assert closed["type"] == "websocket.close"
    assert not caplog.records


def test_clients_can_not_lift_the_time_limit_or_break_the_proxy_by_a_header() -> None:
    seen: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["headers"])

    headers = [(b"X-Request-Timeout-Seconds", b"-1"), (b"x-request-id", b"\xff"), (b"\xfe", b"1"), (b"accept", b"*/*")]

    async def work() -> None:
        async def send(_: Any) -> None: ...

        await ProxyMiddleware(inner)({"type": "http", "path": "/v1/models", "headers": headers}, None, send)
        await ProxyMiddleware(inner)({"type": "websocket", "path": "/v1/models", "headers": headers}, None, send)

    asyncio.run(work())
    assert seen == [[(b"accept", b"*/*")]] * 2


# Sizes and times


@contextmanager
def server(**bounds: Any) -> Iterator[int]:
    before = uvicorn.protocols.http.auto.AutoHTTPProtocol
    uvicorn_with_bounded_headers(**bounds)
    app = build_api(PaperEngine(), ServedModels("m"), max_tokens=50)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(20)
        uvicorn.protocols.http.auto.AutoHTTPProtocol = before
        sock.close()


def exchange(port: int, *pieces: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        answer = b""
        try:
            for piece in pieces:
                sock.sendall(piece)
            while part := sock.recv(65536):
                answer += part
                if b'"status":"ok"' in answer:
                    break
        except ConnectionError:
            pass
        return answer


def test_headers_without_end_are_cut_off() -> None:
    with server(max_bytes=10_000) as port:
        good = exchange(port, b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 5000 + b"\r\n\r\n")
        assert good.startswith(b"HTTP/1.1 200")
        endless = exchange(port, b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: ", *[b"a" * 1000] * 200)
        assert endless.startswith(b"HTTP/1.1 431") or endless == b""  # a reset may overtake the answer
        many = exchange(port, b"GET /health HTTP/1.1\r\nhost: x\r\n", *[b"a: b\r\n" * 200] * 200)
        assert many.startswith(b"HTTP/1.1 431") or many == b""


def test_a_body_counts_for_no_header_and_a_second_request_begins_anew() -> None:
    body = json.dumps({"model": "m", "prompt": "hi", "user": "u" * 1000}).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with server(max_bytes=700) as port:
        answer = exchange(port, post, post, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200") == 3


def test_a_connection_that_never_ends_its_headers_is_closed() -> None:
    with server(max_s=0.3) as port:
        assert exchange(port, b"GET /health HTTP/1.1\r\nhost") == b""
        assert exchange(port) == b""


# Feedback


def with_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def feedback_app(place: Path, feedback: FeedbackConfig | None, keys: tuple[str, ...] = ("a", "b")) -> Any:
    hashes = tuple(hash_key(key) for key in keys)
    return build_api(
        PaperEngine(), ServedModels("m"), max_tokens=50, key_hashes=hashes, place=str(place), feedback=feedback
    )


def test_feedback_is_kept_only_where_the_run_file_asks_for_it(tmp_path: Path) -> None:
    assert ServeConfig().feedback is None
    app = feedback_app(tmp_path, None)
    body = {"rating": "up", "messages": TALK, "id": answer_id("chatcmpl", hash_key("a"))}
    answer = asyncio.run(call(app, "/v1/feedback", body, headers=with_key("a")))
    assert (answer.status, "serve.feedback is not set" in answer.error["message"]) == (404, True)
    assert list(tmp_path.iterdir()) == []


def test_a_key_can_only_judge_its_own_answers(tmp_path: Path) -> None:
    async def work() -> None:
        app = feedback_app(tmp_path, FeedbackConfig())
        mine = (await call(app, "/v1/chat/completions", CHAT, headers=with_key("a"))).json["id"]
        body = {"rating": "up", "messages": TALK, "id": mine}
        other = await call(app, "/v1/feedback", body, headers=with_key("b"))
        assert (other.status, other.error["code"], other.error["param"]) == (403, "not_your_answer", "id")
        assert list(tmp_path.iterdir()) == []
        another = feedback_app(tmp_path, FeedbackConfig())  # another replica, or the same one started anew
        assert (await call(another, "/v1/feedback", body, headers=with_key("a"))).status == 201
        for forged in ("chatcmpl-1", "", "x", mine[:-1] + ("0" if mine[-1] != "0" else "1"), mine.replace("chat", "")):
            answer = await call(app, "/v1/feedback", {**body, "id": forged}, headers=with_key("a"))
            assert answer.status in (400, 403), forged
        assert (
            await call(app, "/v1/feedback", {"rating": "up", "messages": TALK}, headers=with_key("a"))
        ).status == 400

    asyncio.run(work())
    (record,) = storage.list_files(str(tmp_path / "feedback"))
    kept = json.loads(storage.read_bytes(record.uri))["metadata"]["feedback"]
    assert kept["key"] == key_id(hash_key("a"))
    text = Path(record.uri).read_text()
    assert hash_key("a") not in text
    assert Path(record.uri).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "feedback/up").stat().st_mode & 0o777 == 0o700


def test_a_key_leaves_no_more_than_its_quota(tmp_path: Path) -> None:
    async def send(app: Any, key: str, size: int = 10) -> int:
        turns = [*HI, {"role": "assistant", "content": "x" * size}]
        body = {"rating": "up", "messages": turns, "id": answer_id("chatcmpl", hash_key(key))}
        answer = await call(app, "/v1/feedback", body, headers=with_key(key))
        if answer.status == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert "serve.feedback." in answer.error["message"]
        return answer.status

    async def work() -> None:
        app = feedback_app(tmp_path / "a", FeedbackConfig(records_per_day=3))
        assert [await send(app, "a") for _ in range(5)] == [201, 201, 201, 429, 429]
        assert await send(app, "b") == 201  # of each key
        app = feedback_app(tmp_path / "b", FeedbackConfig(bytes_per_day=3000))
        assert [await send(app, "a", 1000) for _ in range(4)] == [201, 201, 429, 429]
        app = feedback_app(tmp_path / "c", FeedbackConfig(max_bytes=500))
        assert [await send(app, "a", size) for size in (100, 1000)] == [201, 413]

    asyncio.run(work())
    sizes = sum(info.size_bytes for info in storage.list_files(str(tmp_path / "b")))
    assert sizes < 3000


def test_ids_are_of_one_key_and_each_is_new() -> None:
    ids = {answer_id("cmpl", hash_key("a")) for _ in range(100)}
    assert len(ids) == 100
    assert all(is_answer_of(one, hash_key("a")) and not is_answer_of(one, hash_key("b")) for one in ids)
    assert not is_answer_of(next(iter(ids)), "")
    for odd in ("", "-", "cmpl-", "\ud800", "é" * 50):
        assert not is_answer_of(odd, hash_key("a"))


# Parsing


@QUICK
@given(JSON)
def test_the_bounded_parser_reads_what_json_reads(tree: Any) -> None:
    try:
        text = json.dumps(tree, allow_nan=False).encode()
        json.dumps(tree, ensure_ascii=False).encode()
    except ValueError:  # NaN, half a pair
        return
    assert strict_json.parse(text, max_bytes=1 << 20) == json.loads(text)


@QUICK
@given(st.binary(max_size=60))
def test_the_bounded_parser_raises_value_errors_only(data: bytes) -> None:
    try:
        strict_json.parse(data, max_bytes=50)
    except ValueError as err:
        message = str(err)
    else:
        message = ""
    assert len(message) < 200


def test_brackets_in_texts_are_no_depth() -> None:
    tree = ["[" * 1000, '"[' * 100, "\\" * 7 + "[" * 100]
    assert strict_json.parse(json.dumps(tree).encode(), max_bytes=1 << 20, max_depth=1) == tree
    with pytest.raises(ValueError, match="nested more than 2"):
        strict_json.parse(b"[[[]]]", max_bytes=100, max_depth=2)
