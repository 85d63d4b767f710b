"""Several answers, log probabilities, limits, shares, canaries, feedback, figures, pages: on an engine of paper."""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftray import config, storage
from ftray.data.formats import read_record
from ftray.engine.protocol import EngineError, OutputChunk, SamplingParams, TokenLogprob
from ftray.errors import ConfigError
from ftray.serve import asgi
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.app import deployment_options
from ftray.serve.auth import answer_id, hash_key, read_key_hashes
from ftray.serve.autoscaling import TtftWindow
from ftray.serve.openai import RequestError
from ftray.serve.pages import openapi
from ftray.serve.rate_limit import RateLimiter, RateLimits
from ftray.serve.routes import build_api
from ftray.serve.routing import Router, event_uri, exceeds, pick
from tests.unit.test_adapter_cache import HoldingEngine, life, put, served
from tests.unit.test_serve_protocol import CHAT, HI, TEXT, PaperEngine, PaperTokenizer, ask, call


class Speller(PaperTokenizer):
    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + i) for i in ids)


class Explaining(PaperEngine):
    """Explains its words: token i is the i-th letter. Its seed is its first word."""

    stop_token_ids = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Speller()

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> AsyncGenerator[OutputChunk, None]:
        self.asked.append((request_id, params))
        return self._explain(params)

    async def _explain(self, params: SamplingParams) -> AsyncGenerator[OutputChunk, None]:
        for token in range(4):
            await asyncio.sleep(0)
            top = tuple((t, -float(t)) for t in range(params.num_logprobs or 0))
            told = (TokenLogprob(token, -0.5 * token, top),) if params.num_logprobs is not None else ()
            text = f"{params.seed}" if token == 0 else "" if token == 3 else "abc"[token]
            yield OutputChunk(text, [token], "stop" if token == 3 else None, 7, token + 1, told)


# n and logprobs


def test_n_answers_have_seeds_of_their_own_and_one_bill() -> None:
    engine = Explaining()
    answer = ask("/v1/chat/completions", {**CHAT, "n": 3, "seed": 5}, engine)
    assert [c["message"]["content"] for c in answer.json["choices"]] == ["5bc", "6bc", "7bc"]
    assert [c["index"] for c in answer.json["choices"]] == [0, 1, 2]
    assert answer.json["usage"] == {"prompt_tokens": 22, "completion_tokens": 12, "total_tokens": 34}
    ask("/v1/completions", {**TEXT, "n": 2}, engine)
    assert [params.seed for _, params in engine.asked] == [5, 6, 7, None, None]
    assert len({request_id for request_id, _ in engine.asked}) == 5


def test_n_streams_are_told_apart_by_their_index() -> None:
    body = {**CHAT, "n": 2, "seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = ask("/v1/chat/completions", body, Explaining()).events
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] == 8
    texts = ["", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["5bc", "6bc"]
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"] == "stop"]
    assert sorted(ends) == [0, 1]


def test_one_of_n_that_fails_ends_all() -> None:
    engine = PaperEngine(error=EngineError("secret"))
    answer = ask("/v1/completions", {**TEXT, "n": 3}, engine)
    assert answer.status == 503
    assert engine.log.count("closed") == 3


def test_chat_logprobs_leave_the_end_token_out() -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 2, "seed": 1}
    content = ask("/v1/chat/completions", body, Explaining()).json["choices"][0]["logprobs"]["content"]
    assert [(e["token"], e["logprob"], e["bytes"]) for e in content] == [
        ("a", 0.0, [97]),
        ("b", -0.5, [98]),
        ("c", -1.0, [99]),
    ]
    assert content[1]["top_logprobs"] == [
        {"token": "a", "logprob": 0.0, "bytes": [97]},
        {"token": "b", "logprob": -1.0, "bytes": [98]},
    ]
    *chunks, _ = ask("/v1/chat/completions", {**body, "stream": True}, Explaining()).events
    streamed = [e for c in chunks if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == content
    assert ask("/v1/chat/completions", CHAT, Explaining()).json["choices"][0]["logprobs"] is None


def test_completion_logprobs_have_their_old_shape() -> None:
    found = ask("/v1/completions", {**TEXT, "logprobs": 1}, Explaining()).json["choices"][0]["logprobs"]
    assert found == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [0.0, -0.5, -1.0],
        "top_logprobs": [{"a": 0.0}, {"a": 0.0}, {"a": 0.0}],
    }


# Limits and keys


def test_a_key_beyond_its_requests_waits_and_others_do_not() -> None:
    now = [0.0]
    meter = RateLimiter(RateLimits(requests_per_minute=3), clock=lambda: now[0])
    for _ in range(3):
        meter.admit("a")
    with pytest.raises(RequestError) as refused:
        meter.admit("a")
    assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "20"})
    meter.admit("b")
    now[0] = 20.0
    meter.admit("a")
    with pytest.raises(RequestError):
        meter.admit("a")


def test_tokens_are_charged_when_known_and_an_overdrawn_budget_is_made_good() -> None:
    now = [0.0]
    meter = RateLimiter(RateLimits(tokens_per_minute=600, tokens_per_day=2000), clock=lambda: now[0])
    meter.admit("a")
    meter.charge("a", 1100)  # 500 too many, at 10 a second
    with pytest.raises(RequestError, match="tokens per minute") as refused:
        meter.admit("a")
    assert refused.value.headers == {"retry-after": "51"}
    now[0] = 50.2
    meter.admit("a")
    meter.charge("a", 1500)
    now[0] += 500  # the minute's are back, the day's are not
    with pytest.raises(RequestError, match="tokens per day"):
        meter.admit("a")


def test_a_429_has_openais_shape_and_says_when_to_come_again() -> None:
    async def work() -> None:
        keys = (hash_key("one"), hash_key("two"))
        app = build_api(
            PaperEngine(), ServedModels("m"), max_tokens=50, key_hashes=keys, limits=RateLimits(requests_per_minute=1)
        )
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        assert (await call(app, "/v1/completions", TEXT, headers=one)).status == 200
        refused = await call(app, "/v1/completions", TEXT, headers=one)
        assert (refused.status, refused.error["type"], refused.error["code"]) == (
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
        )
        assert 55 <= int(refused.headers["retry-after"]) <= 60
        assert (await call(app, "/v1/completions", TEXT, headers=two)).status == 200

    asyncio.run(work())


def test_keys_come_from_a_file_too_and_an_empty_one_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTRAY_API_KEY", "a")
    monkeypatch.setenv("FTRAY_API_KEY_FILE", str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match=r"FTRAY_API_KEY_FILE .* cannot be read"):
        read_key_hashes("127.0.0.1")
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(ConfigError, match="contains no key"):
        read_key_hashes("127.0.0.1")
    (tmp_path / "keys").write_text("b\n\n c \n")
    assert read_key_hashes("0.0.0.0") == (hash_key("a"), hash_key("b"), hash_key("c"))


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "MAX_BODY_S", 0.05)

    async def work() -> None:
        app, sent = build_api(PaperEngine(), ServedModels("m"), max_tokens=50), []
        parts = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> Any:
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "root_path": ""}
        scope |= {"query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http", "asgi": {}}
        await asyncio.wait_for(app(scope, receive, send), 10)
        assert sent[0]["status"] == 408

    asyncio.run(work())


# Shares and canaries


def test_users_stay_with_one_model_and_shares_are_kept() -> None:
    weights = {"a": 0.9, "b": 0.1}
    chosen = {user: pick(weights, user) for user in map(str, range(5000))}
    assert chosen == {user: pick(weights, user) for user in chosen}
    assert 0.08 < Counter(chosen.values())["b"] / 5000 < 0.12
    assert 0.08 < Counter(pick(weights, None) for _ in range(5000))["b"] / 5000 < 0.12
    assert {pick({"a": 0, "b": 1}, str(i)) for i in range(50)} == {"b"}


def canary(**bounds: Any) -> config.CanaryConfig:
    return config.CanaryConfig(model="b", **bounds)


def test_a_canary_goes_on_errors_and_only_then() -> None:
    router = Router({"a": 0.5, "b": 0.5}, canary())
    for i in range(200):
        router.record("a", failed=i % 100 == 0)  # the others' errors are not its own
        router.record("b", failed=False)
    assert router.event is None
    for i in range(200):
        router.record("b", failed=i % 20 == 0)
    assert router.event is not None
    why = r"(\d+) of its last 200 answers failed \((\d\.\d)%; max_error_rate 0\.02\); other models: 0 of \d+"
    found = re.fullmatch(why, router.event["reason"])
    assert found is not None
    assert (6, 2.5) < (int(found[1]), float(found[2])) < (11, 5.1)
    assert {router.choose(str(i), ["a", "b"]) for i in range(100)} == {"a"}
    assert router.choose("x", ["b"]) is None


def answers_until_return(seed: int, rate: float, others: float, share: float, most: int) -> int | None:
    """So many answers of both models it took; None: `most` were not enough. Failures are drawn."""
    rng, router = random.Random(seed), Router({"a": 1 - share, "b": share}, canary())
    for i in range(most):
        model = "b" if rng.random() < share else "a"
        router.record(model, failed=rng.random() < (rate if model == "b" else others))
        if router.event is not None:
            return i + 1
    return None


def test_a_canary_with_5_percent_errors_goes_within_30_seconds() -> None:
    """At 20 answers a second in all, half of them its own."""
    took = [answers_until_return(seed, 0.05, 0.0, share=0.5, most=600) for seed in range(200)]
    assert sum(one is None for one in took) <= 4
    slow = [answers_until_return(seed, 0.05, 0.0, share=0.1, most=3000) for seed in range(50)]
    assert None not in slow


def test_a_canary_that_fails_as_its_others_do_stays() -> None:
    took = [answers_until_return(seed, 0.005, 0.005, share=0.5, most=2000) for seed in range(100)]
    assert sum(one is not None for one in took) <= 8
    router = Router({"a": 0.5, "b": 0.5}, canary())
    for i in range(1000):  # far above its bound, but so are they
        for model in "ab":
            router.record(model, failed=i % 10 == 9)
    assert router.event is None


def test_what_hits_all_models_at_once_returns_no_canary() -> None:
    returned = 0
    for seed in range(50):
        rng, router = random.Random(seed), Router({"a": 0.5, "b": 0.5}, canary())
        for i in range(4600):
            router.record(rng.choice("ab"), failed=4000 <= i < 4300)
        returned += router.event is not None
    assert returned <= 2
    router = Router({"a": 0.5, "b": 0.5}, canary())
    for _ in range(500):  # nothing works, from the first answer on
        for model in "ab":
            router.record(model, failed=True)
    assert router.event is None
    assert not exceeds(100, 100, 1000, 1000)


@pytest.mark.parametrize("num_others", [0, 5, 100, 5000])
def test_one_or_two_failures_among_few_answers_are_no_reason(num_others: int) -> None:
    router = Router({"a": 0.9, "b": 0.1}, canary())
    for _ in range(num_others):
        router.record("a", failed=False)
    for failed in (True, False, False, False, True, False):
        router.record("b", failed=failed)
    assert router.event is None
    for _ in range(3):  # what is broken goes at once, without twenty users' errors
        router.record("b", failed=True)
    assert router.event is not None
    assert router.event["reason"].startswith("3 of its last 7")


def test_the_bound_is_the_tail_of_a_beta_binomial() -> None:
    """scipy's betabinom.sf(2, n, 0.5, 89.5): 0.01002 of 40, 0.00946 of 39; sf(2, n, 1.5, 146.5): 0.0092 of 30, 0.0135 of 35."""
    assert not exceeds(3, 40, 0, 40)
    assert exceeds(3, 39, 0, 40)
    assert not exceeds(3, 35, 1, 98)
    assert exceeds(3, 30, 1, 98)
    assert not exceeds(2, 2, 0, 100_000)
    assert not exceeds(20, 20, 1000, 1000)


def test_a_canary_goes_when_it_is_slow() -> None:
    router = Router({"a": 0.5, "b": 0.5}, canary(max_latency_ratio=1.5))
    for _ in range(30):
        router.record_first_text("a", 0.1)
        router.record_first_text("b", 0.14)
    assert router.event is None
    for _ in range(60):
        router.record_first_text("b", 0.2)
    assert router.event is not None
    assert router.event["reason"].startswith(
        "its median time to first text is 0.170 s, that of the other models 0.100 s"
    )


def test_replicas_agree_on_a_return_and_other_shares_begin_anew(tmp_path: Path) -> None:
    async def work() -> None:
        weights, place = {"a": 0.9, "b": 0.1}, str(tmp_path)
        first, second = Router(weights, canary(), place), Router(weights, canary(), place)
        await first.start()
        await second.start()
        for _ in range(20):
            first.record("b", failed=True)
        await first.stop()  # writes what it knows
        await second.stop()
        assert second.event == first.event is not None
        uri = event_uri(place, weights, canary())
        assert json.loads(storage.read_bytes(uri))["event"] == "canary_returned"
        fresh = Router({"a": 0.8, "b": 0.2}, canary(), place)
        await fresh.start()
        assert fresh.event is None
        await fresh.stop()

    asyncio.run(work())


def test_default_is_split_named_models_are_not_and_a_failing_canary_ends(tmp_path: Path) -> None:
    class Failing(HoldingEngine):
        async def _say(self, reply: str) -> AsyncGenerator[OutputChunk, None]:
            if reply == "new":
                raise EngineError("injected")
            async for chunk in super()._say(reply):
                yield chunk

    put(tmp_path, "old")
    put(tmp_path, "new")
    weights = {"small:old": 0.8, "small:new": 0.2}
    trial = config.CanaryConfig(model="small:new")

    async def work() -> None:
        app = build_api(
            Failing(), served(tmp_path), max_tokens=5, router=Router(weights, trial, str(tmp_path)), place=str(tmp_path)
        )
        async with life(app):
            listed = await call(app, "/v1/models")
            assert [card["id"] for card in listed.json["data"]] == ["default", "small", "small:new", "small:old"]
            seen: Counter[int] = Counter()
            for i in range(300):
                answer = await call(app, "/v1/completions", {"model": "default", "prompt": "x", "user": f"u{i}"})
                seen[answer.status] += 1
                if answer.status == 200:
                    assert answer.json["model"] == "small:old"
            assert seen[503] == 3  # its first three, and no more
            direct = await call(app, "/v1/completions", {"model": "small:new", "prompt": "x"})
            assert direct.status == 503
            figures = b"".join((await call(app, "/metrics")).pieces).decode()
            assert 'ftray_answers_total{model="small:new",status="503"} 4.0' in figures
            assert 'ftray_answers_total{model="small:old",status="200"} 297.0' in figures
            assert 'ftray_tokens_total{kind="completion",model="small:old"} 297.0' in figures
            assert "ftray_answers_running 0.0" in figures
        (event,) = storage.list_files(str(tmp_path / "serve/events"))
        assert "3 of its last 3 answers failed" in json.loads(storage.read_bytes(event.uri))["reason"]

    asyncio.run(work())


def test_a_canary_that_fails_one_time_in_twenty_is_out_by_its_hundredth_answer(tmp_path: Path) -> None:
    class Failing(HoldingEngine):
        num_asked = 0

        async def _say(self, reply: str) -> AsyncGenerator[OutputChunk, None]:
            self.num_asked += reply == "new"
            if reply == "new" and self.num_asked % 20 == 0:
                raise EngineError("injected")
            async for chunk in super()._say(reply):
                yield chunk

    put(tmp_path, "old")
    put(tmp_path, "new")
    router = Router({"small:old": 0.5, "small:new": 0.5}, config.CanaryConfig(model="small:new"), str(tmp_path))
    engine = Failing()

    async def work() -> None:
        app = build_api(engine, served(tmp_path), max_tokens=5, router=router, place=str(tmp_path))
        async with life(app):
            for _ in range(300):
                await call(app, "/v1/completions", {"model": "default", "prompt": "x"})
        (event,) = storage.list_files(str(tmp_path / "serve/events"))
        assert "max_error_rate 0.02" in json.loads(storage.read_bytes(event.uri))["reason"]

    asyncio.run(work())
    assert 60 <= engine.num_asked <= 100


# Figures


@pytest.mark.parametrize("stream", [True, False])
def test_a_first_text_counts_when_it_comes_not_when_its_answer_ends(stream: bool) -> None:
    engine, times = PaperEngine(), TtftWindow()
    router = Router({"m": 0.5, "other": 0.5}, config.CanaryConfig(model="m"))

    async def work() -> None:
        engine.hold = asyncio.Event()
        app = build_api(engine, ServedModels("m"), max_tokens=50, first_times=times, router=router)
        async with life(app):
            body = {**TEXT, "model": "m", "stream": stream, "n": 2}
            answer = asyncio.create_task(call(app, "/v1/completions", body))
            async with asyncio.timeout(30):
                while times.median() == 0:
                    await asyncio.sleep(0.001)
            assert not answer.done()
            running = b"".join((await call(app, "/metrics")).pieces).decode()
            assert 'ftray_first_token_seconds_count{model="m"} 1.0' in running
            assert "ftray_answers_total{" not in running
            engine.hold.set()
            assert (await answer).status == 200
            ended = b"".join((await call(app, "/metrics")).pieces).decode()
            assert 'ftray_first_token_seconds_count{model="m"} 1.0' in ended  # once, of two texts

    asyncio.run(work())


# Feedback


def tell(place: Path | None, body: Any) -> Any:
    where = str(place) if place else None
    app = build_api(PaperEngine(), ServedModels("m"), max_tokens=50, place=where, feedback=config.FeedbackConfig())
    return asyncio.run(call(app, "/v1/feedback", {"id": answer_id("chatcmpl", ""), **body}))


TALK = [*HI, {"role": "assistant", "content": "Good day."}]


def test_feedback_becomes_records_that_training_reads(tmp_path: Path) -> None:
    for body in (
        {"rating": "up", "messages": TALK, "model": "m", "comment": "kind"},
        {"rating": "down", "messages": TALK},
        {"rating": "down", "messages": TALK, "correction": "Hello!"},
    ):
        assert tell(tmp_path, body).status == 201
    records = {
        folder: [json.loads(storage.read_bytes(f.uri)) for f in storage.list_files(str(tmp_path / "feedback" / folder))]
        for folder in ("up", "down")
    }
    read = {folder: [read_record(r, "auto", None) for r in found] for folder, found in records.items()}
    assert sorted(talk.messages[-1].content for talk in read["up"]) == ["Good day.", "Hello!"]  # type: ignore[union-attr]
    assert [[m.role for m in talk.messages] for talk in read["down"]] == [["user", "assistant"]]  # type: ignore[union-attr]
    assert {"rating": "up", "comment": "kind", "model": "m"}.items() <= next(
        r["metadata"]["feedback"] for r in records["up"] if r["metadata"]["feedback"]["rating"] == "up"
    ).items()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"rating": "fine"}, "rating"),
        ({"messages": HI}, "messages"),
        ({"messages": [*HI, *HI]}, "messages"),
        ({"comment": "x" * 5000}, "comment"),
        ({"correction": ""}, "correction"),
        ({"path": "/etc"}, "path"),
    ],
)
def test_feedback_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any], param: str | None) -> None:
    answer = tell(tmp_path, {"rating": "up", "messages": TALK, **change})
    assert (answer.status, answer.error["param"]) == (400, param)
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_feedback_is_refused() -> None:
    assert tell(None, {"rating": "up", "messages": TALK}).status == 404


# Pages


def test_pages_need_no_key_and_ask_nobody_else() -> None:
    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name in ("src", "href")]
            assert not [name for name, _ in attrs if name.startswith("on") or name == "style"]

    for path in ("/", "/docs", "/chat.js", "/docs.js", "/page.css"):
        answer = ask(path, key_hashes=(hash_key("k"),))
        assert answer.status == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        text = b"".join(answer.pieces).decode()
        assert not re.findall(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", text)
        if answer.headers["content-type"].startswith("text/html"):
            links = Links()
            links.feed(text)
            for link in set(links.found) - {"data:,", "."}:
                assert ask(f"/{link}").status == 200, link


def test_the_described_api_is_the_one_there_is() -> None:
    described = openapi()
    assert ask("/openapi.json").json == described
    for path, methods in described["paths"].items():
        for method in methods:
            answer = ask(path.replace("{model}", "m"), b"" if method == "post" else None, method=method.upper())
            assert answer.status in (200, 400, 404), path  # 404: feedback, where the endpoint keeps none
            assert str(answer.status) in methods[method]["responses"]
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(described)))
    assert references <= described["components"]["schemas"].keys()


def test_no_slot_is_idle_for_more_than_20_ms_while_requests_wait() -> None:
    router = deployment_options(config.ServeConfig())["request_router_config"]
    assert 0 < router.initial_backoff_s <= router.max_backoff_s <= 0.02
