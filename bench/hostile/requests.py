"""Hostile requests: bodies that a client sends to the endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from bench.hostile.case import Case, Place, cases_of

CHAT, TEXT, FEEDBACK = "/v1/chat/completions", "/v1/completions", "/v1/feedback"
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]
HI = [{"role": "user", "content": "hi"}]


class Tokenizer:
    """A byte is a token."""

    chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    eos_token_id = 0
    all_special_tokens = ("<end>",)
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], **_: bool) -> str:
        return bytes(ids).decode(errors="replace")


class Engine:
    """Answers with one word, and checks prompts and schemas as the engines do."""

    tokenizer, max_context = Tokenizer(), 4096

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def health(self) -> None: ...

    def check_schema(self, schema: str) -> None:
        json.loads(schema)

    def check_grammar(self, grammar: str) -> None: ...

    def generate(
        self, request_id: str, prompt_ids: list[int], params: Any, *, adapter: str | None = None
    ) -> AsyncIterator[Any]:
        from ftray.engine.protocol import check_request

        check_request(prompt_ids, params, 256, self.max_context)
        return self._answer(len(prompt_ids))

    async def _answer(self, length: int) -> AsyncIterator[Any]:
        from ftray.engine.protocol import OutputChunk

        yield OutputChunk("yes", [1], "stop", length, 1)


def post() -> None:
    """Sends `body` to the path in `path`. Raises ConfigError with the endpoint's own sentence for a 4xx.

    A 5xx, or an answer that is not in OpenAI's shape, is a fault.
    """
    from ftray import config
    from ftray.errors import ConfigError
    from ftray.serve.adapter_cache import ServedModels
    from ftray.serve.routes import build_api
    from ftray.serve.routing import Router

    path, body = Path("path").read_text(), Path("body").read_bytes()
    parts = [body[i : i + 65536] for i in range(0, len(body), 65536)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        await asyncio.Event().wait()
        return {}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = build_api(
        Engine(),  # type: ignore[arg-type]
        ServedModels("m"),
        max_tokens=50,
        router=Router({"m": 1.0}),
        place=str(Path("place").absolute()),
        feedback=config.FeedbackConfig(),
    )
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
    }
    asyncio.run(app({**scope, "headers": [], "http_version": "1.1", "scheme": "http", "asgi": {}}, receive, send))
    status = sent[0]["status"]
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    if status >= 500:
        raise RuntimeError(f"{status}: {answer[:300]!r}")
    if status >= 400:
        raise ConfigError(f"{status}: {json.loads(answer)['error']['message'][:500]}")


def schema(text: str) -> bytes:
    """A chat request with a JSON schema, given as text."""
    body = {
        "model": "m",
        "messages": HI,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 0}},
    }
    return json.dumps(body).replace('"schema": 0', f'"schema": {text}').encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi", **fields}).encode()


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": HI, **fields}).encode()


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _calling(arguments: str) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


BODIES: dict[str, tuple[str, bytes]] = {
    "empty": (TEXT, b""),
    "bytes": (TEXT, bytes(range(256)) * 100),
    "too-large": (TEXT, b" " * (2 << 20)),
    "nested-arrays": (CHAT, b"[" * 1_000_000),
    "nested-objects": (CHAT, b'{"a":' * 100_000),
    "nested-messages": (CHAT, b'{"model": "m", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested-schema": (CHAT, schema('{"a":' * 2000 + "1" + "}" * 2000)),
    "endless-number-in-schema": (CHAT, schema('{"minItems": 1e999}')),
    "huge-number-in-schema": (CHAT, schema('{"minItems": 1e300}')),
    "repetitions-in-schema": (CHAT, schema('{"type": "string", "pattern": "(a{1000}){1000}{1000}"}')),
    "long-schema": (CHAT, schema(json.dumps({"enum": ["x" * 100] * 5000}))),
    "half-a-pair-in-schema": (CHAT, schema('{"title": "\\ud800"}')),
    "huge-integer": (TEXT, b'{"model": "m", "prompt": "x", "max_tokens": ' + b"9" * 500_000 + b"}"),
    "large-integer": (TEXT, text(max_tokens=10**300)),
    "large-token": (TEXT, text(prompt=[10**300])),
    "negative-token": (TEXT, text(prompt=[-1])),
    "unknown-token": (TEXT, text(prompt=[2**30])),
    "endless-temperature": (TEXT, b'{"model": "m", "prompt": "x", "temperature": 1e999}'),
    "nan-temperature": (TEXT, b'{"model": "m", "prompt": "x", "temperature": NaN}'),
    "twice": (TEXT, b'{"model": "m", "model": "n", "prompt": "x"}'),
    "half-a-pair": (TEXT, b'{"model": "m", "prompt": "\\ud800"}'),
    "half-a-pair-model": (TEXT, b'{"model": "\\ud800", "prompt": "x"}'),
    "half-a-pair-user": (TEXT, b'{"model": "default", "prompt": "x", "user": "\\udfff"}'),
    "half-a-pair-field": (TEXT, b'{"model": "m", "prompt": "x", "\\ud800": 1}'),
    "utf-16": (TEXT, text().decode().encode("utf-16")),
    "model-path": (TEXT, text(model="../../outside/secret.txt")),
    "model-nul": (TEXT, text(model="m\x00")),
    "model-of-a-megabyte": (TEXT, text(model="m" * 900_000)),
    "stops-without-end": (TEXT, text(stop=["x"] * 100_000)),
    "answers-without-end": (TEXT, text(n=10**9)),
    "prompt-tree": (TEXT, text(prompt={"a": 1})),
    "prompt-of-a-megabyte": (TEXT, text(prompt="x" * 1_000_000)),
    "messages-without-end": (CHAT, json.dumps({"model": "m", "messages": HI * 20_000}).encode()),
    "role-unknown": (CHAT, json.dumps({"model": "m", "messages": [{"role": "{{ x }}", "content": "x"}]}).encode()),
    "template-in-request": (CHAT, json.dumps({"model": "m", "messages": HI, "chat_template": "{{ 7 * 7 }}"}).encode()),
    "tools-without-end": (CHAT, chat(tools=[_tool(f"f{i}") for i in range(5000)])),
    "deep-arguments": (CHAT, chat(messages=[*HI, _calling('{"a":' * 5000 + "1" + "}" * 5000)])),
    "arguments-of-a-megabyte": (CHAT, chat(messages=[*HI, _calling('{"a": "' + "x" * 900_000)])),
    "variables-of-the-template": (CHAT, chat(chat_template_kwargs={"messages": 1})),
    "feedback-of-another": (FEEDBACK, json.dumps({"rating": "up", "messages": TALK, "id": "chatcmpl-0"}).encode()),
    "feedback-without-id": (FEEDBACK, json.dumps({"rating": "up", "messages": TALK}).encode()),
    "feedback-too-large": (FEEDBACK, b" " * 500_000),
    "feedback-path": (FEEDBACK, json.dumps({"rating": "../../outside/canary", "messages": HI, "id": "x"}).encode()),
}  # fmt: skip


HARMLESS = {"repetitions-in-schema"}  # llguidance unrolls them only as far as an answer gets


@cases_of("requests")
def requests() -> Iterator[Case]:
    """A case for each body."""
    for name, (path, body) in BODIES.items():

        def prepare(place: Place, path: str = path, body: bytes = body) -> None:
            place.write("path", path)
            place.write("body", body)

        yield Case(name, prepare, post, harmless=name in HARMLESS)
