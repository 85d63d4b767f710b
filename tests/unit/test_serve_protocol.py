"""The endpoint's words: what is refused and how, streams and their ends, keys. An engine of paper, no Ray, no torch."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from ftray.config import ServeConfig
from ftray.engine.protocol import ContextLengthError, EngineError, OutputChunk, SamplingParams, SchemaError
from ftray.errors import ConfigError, ModelError
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.auth import hash_key, read_key_hashes
from ftray.serve.openai import MAX_BODY_BYTES, RequestError
from ftray.serve.openai_requests import ChatRequest, CompletionRequest, parse_request
from ftray.serve.routes import build_api
from ftray.serve.run import check_endpoint

HI = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m", "messages": HI}
TEXT = {"model": "m", "prompt": "hi"}


class PaperTokenizer:
    """A byte is a token; turns are lines."""

    chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    eos_token_id = 0
    all_special_tokens = ("<end>",)
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [0 if c == "<end>" else ord(c) for c in text]}

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(map(chr, ids))


class PaperEngine:
    """Says its words one by one, and remembers what it was asked and how its requests ended."""

    def __init__(self, words: tuple[str, ...] = ("Good ", "", "day", "."), error: Exception | None = None) -> None:
        self.tokenizer, self.max_context = PaperTokenizer(), 100
        self.words, self.error, self.dead = words, error, False
        self.asked: list[tuple[str, SamplingParams]] = []
        self.log: list[str] = []
        self.hold: asyncio.Event | None = None

    async def start(self) -> None:
        self.log.append("start")

    async def stop(self) -> None:
        self.log.append("stop")

    def health(self) -> None:
        if self.dead:
            raise EngineError("secret path /home/x")

    def check_schema(self, schema: str) -> None:
        if "not" in json.loads(schema):
            raise SchemaError("the JSON schema cannot be satisfied")

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> AsyncGenerator[OutputChunk, None]:
        self.health()
        if len(prompt_ids) + params.max_tokens > self.max_context:
            raise ContextLengthError("too long for the context")
        self.asked.append(("".join(map(chr, prompt_ids)), params))
        return self._generate(len(prompt_ids))

    async def _generate(self, num_prompt_tokens: int) -> AsyncGenerator[OutputChunk, None]:
        try:
            for i, word in enumerate(self.words):
                await asyncio.sleep(0)
                last = i == len(self.words) - 1
                if last and self.error:
                    raise self.error
                if last and self.hold:
                    await self.hold.wait()
                yield OutputChunk(word, [i], "stop" if last else None, num_prompt_tokens, i + 1)
            self.log.append("finished")
        finally:
            self.log.append("closed")


class Answer:
    def __init__(self, sent: list[dict[str, Any]]) -> None:
        self.status: int = sent[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        self.pieces = [message.get("body", b"") for message in sent[1:]]

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.pieces))

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        text = b"".join(self.pieces).decode()
        assert text.endswith("\n\n")
        lines = text[:-2].split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


async def call(
    app: Any,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    leave: asyncio.Event | None = None,
    method: str | None = None,
) -> Answer:
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    parts = [raw[i : i + 65536] for i in range(0, len(raw), 65536)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method or ("GET" if body is None else "POST"),
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "root_path": "",
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        "http_version": "1.1",
        "scheme": "http",
        "asgi": {"version": "3.0"},
    }
    await asyncio.wait_for(app(scope, receive, send), 10)
    return Answer(sent)


def ask(path: str, body: Any = None, engine: PaperEngine | None = None, **how: Any) -> Answer:
    app = build_api(engine or PaperEngine(), ServedModels("m"), max_tokens=50, key_hashes=how.pop("key_hashes", ()))
    return asyncio.run(call(app, path, body, **how))


# What is asked


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"user": 5}, "user"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        *(
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
                "response_format.json_schema.schema",
            )
            for schema in (
                {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000},
                {"anyOf": [{"type": "string", "maxLength": 6000}] * 2},
                {"type": "string", "pattern": "^(a{ 20, 30000 })$"},
            )
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "b" * 20000}}}},
            "response_format.json_schema.schema",
        ),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"logit_bias": {"x": 5}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"top_k": -2}, "top_k"),
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
        ({"max_tokens": 51}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 51}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": "x" * 257}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"model": None}, "model"),
        ({"model": ["m"]}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": HI * 257}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "user", "content": "x", "train": False}]}, "messages[0].train"),
    ],
)
def test_what_is_not_carried_out_or_out_of_bounds_is_refused_by_name(change: dict[str, Any], param: str | None) -> None:
    body = {**CHAT, **change}
    with pytest.raises(RequestError) as caught:
        parse_request(json.dumps(body).encode(), ChatRequest, max_tokens=50)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert (param or "").split("[")[0].split(".")[-1] in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        *({"prompt": prompt} for prompt in (None, "", [], 5, [1, "a"], ["a", ""], [[1], []], [[1, "a"]], ["a"] * 17)),
        {"prompt": ["a"] * 8, "n": 5},
        {"prompt": "a", "echo": True, "logprobs": 1},
    ],
)
def test_prompts_that_are_empty_too_many_or_ask_for_their_log_probabilities_are_refused(change: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(json.dumps({"model": "m", **change}).encode(), CompletionRequest, max_tokens=50)
    assert (caught.value.param or "").startswith("echo" if "echo" in change else "prompt")


def test_several_prompts_are_answered_in_order_and_echoed() -> None:
    engine = PaperEngine()
    body = {"model": "m", "prompt": ["one", "three"], "n": 2, "echo": True, "seed": 7}
    answer = ask("/v1/completions", body, engine).json
    texts = ["oneGood day.", "oneGood day.", "threeGood day.", "threeGood day."]
    assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(texts))
    assert [(prompt, params.seed) for prompt, params in engine.asked] == [
        ("one", 7),
        ("one", 8),
        ("three", 7),
        ("three", 8),
    ]
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 16, "total_tokens": 24}
    streamed = ask("/v1/completions", {**body, "stream": True, "n": 1, "prompt": [[104, 105], [111]]}).events[:-1]
    by_index: dict[int, str] = {0: "", 1: ""}
    for event in streamed:
        by_index[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert by_index == {0: "hiGood day.", 1: "oGood day."}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "user": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_broken_json_is_a_400(body: bytes) -> None:
    answer = ask("/v1/chat/completions", body, method="POST")
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_what_changes_nothing_is_accepted() -> None:
    harmless = {"n": 1, "logprobs": False, "tools": [], "frequency_penalty": 0, "presence_penalty": 0.0, "user": "u"}
    also = {"metadata": {"a": "b"}, "response_format": {"type": "text"}, "seed": -5, "stop": None, "store": False}
    returned = {"role": "assistant", "content": "hello", "refusal": None, "annotations": None, "tool_calls": None}
    body = {**CHAT, **harmless, **also, "messages": [*HI, returned, *HI]}
    engine = PaperEngine()
    assert ask("/v1/chat/completions", body, engine).status == 200
    assert engine.asked[0][1].seed == -5


def test_content_parts_are_joined_and_developer_means_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    engine = PaperEngine()
    ask("/v1/chat/completions", {**CHAT, "messages": messages}, engine)
    assert engine.asked[0][0] == "system:s<end>user:ab<end>assistant:"


def test_sampling_reaches_the_engine_and_left_out_limits_are_filled() -> None:
    engine = PaperEngine()
    how = {"temperature": 0.5, "top_p": 0.9, "stop": ["x", "y"], "seed": 3, "max_completion_tokens": 7, "top_k": 4}
    how |= {
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": -3},
    }
    ask("/v1/chat/completions", {**CHAT, **how}, engine)
    ask("/v1/completions", TEXT, engine)
    ask("/v1/completions", {**TEXT, "prompt": [104] * 90}, engine)
    assert [params for _, params in engine.asked] == [
        SamplingParams(
            7,
            temperature=0.5,
            top_p=0.9,
            stop=("x", "y"),
            seed=3,
            top_k=4,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.2,
            logit_bias=((5, -3),),
        ),
        SamplingParams(50, temperature=1.0),
        SamplingParams(10, temperature=1.0),  # what is left of 100
    ]


def test_a_schema_reaches_the_engine_and_one_that_cannot_be_kept_to_is_a_400() -> None:
    def answer(form: Any) -> tuple[Answer, PaperEngine]:
        engine = PaperEngine()
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "response_format": form}
        return ask("/v1/chat/completions", body, engine), engine

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    _, engine = answer({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}})
    (asked,) = engine.asked
    assert json.loads(asked[1].json_schema or "") == schema
    _, engine = answer({"type": "json_object"})
    assert json.loads(engine.asked[0][1].json_schema or "") == {"type": "object"}
    _, engine = answer({"type": "text"})
    assert engine.asked[0][1].json_schema is None
    refused, engine = answer({"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}})
    assert (refused.status, refused.error["param"], engine.asked) == (400, "response_format", [])


def test_a_prompt_beyond_the_context_is_a_400_with_openais_code() -> None:
    for body in ({**TEXT, "prompt": [1] * 100}, {**TEXT, "prompt": [1] * 90, "max_tokens": 11}):
        answer = ask("/v1/completions", body)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


# What is answered


def test_a_plain_chat_answer() -> None:
    answer = ask("/v1/chat/completions", CHAT)
    assert answer.json["object"] == "chat.completion"
    assert answer.json["model"] == "m"
    assert answer.json["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "Good day.", "refusal": None},
        }
    ]
    num_prompt_tokens = len("user:hi<end>assistant:")
    total = num_prompt_tokens + 4
    assert answer.json["usage"] == {"prompt_tokens": num_prompt_tokens, "completion_tokens": 4, "total_tokens": total}


def test_a_chat_stream_has_role_texts_finish_usage_and_done() -> None:
    answer = ask("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = answer.events
    assert done == "[DONE]"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Good "}, {"content": "day"}, {"content": "."}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert len(answer.pieces) == 6  # each leaves as it comes


def test_a_completion_stream_without_usage() -> None:
    answer = ask("/v1/completions", {**TEXT, "stream": True})
    *chunks, done = answer.events
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Good ", "day", "."]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_models_and_health() -> None:
    assert ask("/v1/models").json["data"][0]["id"] == "m"
    assert ask("/v1/models/m").json["object"] == "model"
    assert ask("/health").json == {"status": "ok"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "other"}, 404, "model_not_found"),
        ("/v1/completions", {**TEXT, "model": "../m"}, 404, "model_not_found"),
        ("/v1/models/other", None, 404, "model_not_found"),
        ("/v1/embeddings", TEXT, 404, None),
        ("/v1/models/", None, 404, "model_not_found"),
        ("/page.html", None, 404, None),
        ("/../keys", None, 404, None),
        ("/static/chat.html", None, 404, None),
        ("/v1/feedback", None, 405, None),
        ("/v1/models", TEXT, 405, None),
        ("/v1/completions", b'{"a": "' + b"x" * MAX_BODY_BYTES + b'"}', 413, "body_too_large"),
    ],
)
def test_every_refusal_has_openais_shape(path: str, body: Any, status: int, code: str | None) -> None:
    answer = ask(path, body)
    assert (answer.status, answer.error["code"]) == (status, code)


def test_a_body_that_lies_about_its_length_is_cut_off() -> None:
    lie = {"content-length": "10"}
    assert ask("/v1/completions", b"x" * (MAX_BODY_BYTES + 1), headers=lie).status == 413
    assert ask("/v1/completions", TEXT, headers={"content-length": "9" * 30}).status == 413


# What goes wrong


def test_a_dead_engine_is_a_503_that_tells_nothing_inside() -> None:
    engine = PaperEngine()
    engine.dead = True
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {**TEXT, "stream": True}),
        ("/health", None),
    ):
        answer = ask(path, body, engine)
        assert (answer.status, answer.error["code"]) == (503, "engine_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert "secret" not in str(answer.json)


def test_an_engine_that_dies_in_the_middle_ends_a_stream_with_an_error_and_no_done() -> None:
    answer = ask("/v1/completions", {**TEXT, "stream": True}, PaperEngine(error=EngineError("secret")))
    assert answer.status == 200
    assert answer.events[-1]["error"]["type"] == "server_error"
    assert "[DONE]" not in answer.events
    assert "secret" not in str(answer.events)
    assert ask("/v1/completions", TEXT, PaperEngine(error=EngineError("secret"))).status == 503


def test_an_answer_that_takes_too_long_is_ended() -> None:
    async def work() -> None:
        engine = PaperEngine()
        engine.hold = asyncio.Event()
        app = build_api(engine, ServedModels("m"), max_tokens=50, max_answer_s=0.5)
        assert (await call(app, "/v1/completions", TEXT)).error["code"] == "timeout"
        assert (await call(app, "/v1/completions", {**TEXT, "stream": True})).events[-1]["error"]["code"] == "timeout"
        assert engine.log == ["closed", "closed"]

    asyncio.run(work())


def test_a_surprise_is_a_500_that_quotes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    surprise = KeyError("quoting the prompt")
    engine = PaperEngine(error=surprise)
    engine.generate = None  # type: ignore[assignment,method-assign]
    for answer in (ask("/v1/completions", TEXT, PaperEngine(error=surprise)), ask("/v1/completions", TEXT, engine)):
        assert (answer.status, answer.error["type"]) == (500, "server_error")
        assert "quoting" not in answer.error["message"]
    with pytest.raises(RuntimeError, match="unexpected KeyError") as caught:  # in a stream: the connection breaks
        ask("/v1/completions", {**TEXT, "stream": True}, PaperEngine(error=surprise))
    assert caught.value.__suppress_context__
    assert "KeyError" in caplog.text
    assert "quoting the prompt" not in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(stream: bool) -> None:
    async def work() -> None:
        engine, leave = PaperEngine(), asyncio.Event()
        engine.hold = asyncio.Event()  # the last word never comes
        app = build_api(engine, ServedModels("m"), max_tokens=50)
        request = asyncio.create_task(call(app, "/v1/completions", {**TEXT, "stream": stream}, leave=leave))
        await asyncio.sleep(0.05)
        assert engine.log == []
        leave.set()
        await asyncio.sleep(0.05)
        assert engine.log == ["closed"]
        request.cancel()

    asyncio.run(work())


def test_serve_cancelling_a_request_frees_the_engine() -> None:
    async def work() -> None:
        engine = PaperEngine()
        engine.hold = asyncio.Event()
        app = build_api(engine, ServedModels("m"), max_tokens=50)
        request = asyncio.create_task(call(app, "/v1/completions", {**TEXT, "stream": True}))
        await asyncio.sleep(0.05)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert engine.log == ["closed"]

    asyncio.run(work())


def test_the_apps_life_is_the_engines_life() -> None:
    async def work() -> None:
        engine = PaperEngine()
        app = build_api(engine, ServedModels("m"), max_tokens=50, key_hashes=(hash_key("k"),))
        messages = iter(["lifespan.startup", "lifespan.shutdown"])
        sent: list[str] = []

        async def receive() -> dict[str, str]:
            return {"type": next(messages)}

        async def send(message: dict[str, str]) -> None:
            sent.append(message["type"])

        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
        assert engine.log == ["start", "stop"]
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    asyncio.run(work())


# Keys and addresses


@pytest.mark.parametrize(
    ("header", "path", "status"),
    [
        ("Bearer second", "/v1/models", 200),
        ("bearer first", "/v1/models", 200),
        ("Bearer wrong", "/v1/models", 401),
        ("Bearer ", "/v1/models", 401),
        ("first", "/v1/models", 401),
        ("Basic first", "/v1/models", 401),
        (None, "/v1/models", 401),
        (None, "/nowhere", 401),
        (None, "//health", 401),
        (None, "/health/x", 401),
        (None, "/health", 200),
    ],
)
def test_every_path_but_health_needs_a_key(header: str | None, path: str, status: int) -> None:
    keys = (hash_key("first"), hash_key("second"))
    answer = ask(path, headers={"Authorization": header} if header else None, key_hashes=keys)
    assert answer.status == status
    if status == 401:
        assert answer.error["code"] == "invalid_api_key"


def test_pages_of_allowed_origins_may_call_the_endpoint() -> None:
    def asked(origin: str, origins: tuple[str, ...], method: str) -> tuple[int, str | None]:
        app = build_api(
            PaperEngine(), ServedModels("m"), max_tokens=50, key_hashes=(hash_key("k"),), cors_origins=origins
        )
        headers = {"origin": origin, "authorization": "Bearer k"}
        if method == "OPTIONS":  # the browser's question before the request, without a key
            headers = {"origin": origin, "access-control-request-method": "POST"}
            headers["access-control-request-headers"] = "authorization,content-type,x-stainless-lang"
        answer = asyncio.run(call(app, "/v1/models", headers=headers, method=method))
        return answer.status, answer.headers.get("access-control-allow-origin")

    page = "https://app.example"
    for method in ("OPTIONS", "GET"):
        assert asked(page, (page,), method) == (200, page)
        assert asked(page, ("*",), method) == (200, "*")
        assert asked("https://evil.example", (page,), method)[1] is None
    assert asked(page, (), "OPTIONS") == (401, None)
    for origin in ("app.example", "https://app.example/x", "https://a b", ""):
        with pytest.raises(ValueError, match="is not an origin"):
            ServeConfig.model_validate({"cors_origins": [origin]})


def test_an_open_host_without_a_key_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTRAY_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.5", "example.org"):
        with pytest.raises(ConfigError, match="FTRAY_API_KEY"):
            read_key_hashes(host)
    for host in ("127.0.0.1", "localhost", "::1"):
        assert read_key_hashes(host) == ()
    monkeypatch.setenv("FTRAY_API_KEY", " a, b ,,")
    assert read_key_hashes("0.0.0.0") == (hash_key("a"), hash_key("b"))


def test_a_port_that_is_taken_and_a_directory_without_model_are_told(tmp_path: Path) -> None:
    import socket

    with pytest.raises(ModelError, match="ftray export"):
        check_endpoint(tmp_path, ServeConfig(port=0))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} cannot be used .*; set another serve.port"):
            check_endpoint(tmp_path, ServeConfig(port=port))
    check_endpoint(tmp_path, ServeConfig(port=0))


def test_protocols_and_checks_import_no_ray_and_no_torch() -> None:
    modules = "ftray.serve.openai, ftray.engine.protocol, ftray.engine.detokenizer, ftray.serve.routes, ftray.serve.run"
    code = f"import sys, {modules}; print(sorted({{'ray', 'torch', 'transformers'}} & sys.modules.keys()))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
