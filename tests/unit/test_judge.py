"""A judge over HTTP: asked in both orders, asked again when told to wait, and its key is nowhere but in the request."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ftray import config
from ftray.console import Console
from ftray.errors import ConfigError, FtrayError, RunError
from ftray.evaluate.judge import NUM_AT_ONCE, judge, parse_verdict
from ftray.evaluate.stats import wilson
from tests.http_server import Reply, http_server

KEY = "sk-very-secret-0123456789"


def completion(text: object) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Endpoint:
    """An OpenAI-compatible endpoint whose judge is a function of both answers. Counts, and remembers, what it is asked."""

    def __init__(self, say: Callable[[str, str], object]) -> None:
        self.say, self.before = say, list[Reply]()  # before: replies to the first requests
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.refuse: Callable[[dict[str, Any]], Reply | None] = lambda _: None  # else the judge answers
        self._lock = threading.Lock()

    def answer(self, path: str, key: str | None, body: dict[str, Any]) -> Reply:
        assert path == "/v1/chat/completions"
        with self._lock:
            self.asked.append(body)
            self.keys.append(key)
            if self.before:
                return self.before.pop(0)
        if (refusal := self.refuse(body)) is not None:
            return refusal
        (message,) = body["messages"]
        a, b = (re.search(f"<answer_{x}>\n(.*)\n</answer_{x}>", message["content"], re.DOTALL) for x in "ab")
        assert a is not None
        assert b is not None
        return completion(self.say(a[1], b[1]))


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[str]:
    def answer(path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        return endpoint.answer(path, headers["authorization"], json.loads(body))

    with http_server(answer) as address:
        yield f"{address}/v1"


@pytest.fixture
def longer() -> Endpoint:
    """A judge that prefers the longer answer."""
    return Endpoint(lambda a, b: f"I think so. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.002)
    monkeypatch.delenv("JUDGE_KEY", raising=False)


# Tuned is longer in 12, shorter in 5, as long in 3.
ANSWERS = [("b" * 5, "t" * 9)] * 12 + [("b" * 9, "t" * 5)] * 5 + [("b" * 5, "t" * 5)] * 3


def run_of(root: Path, url: str, **settings: Any) -> config.RunConfig:
    folder = root / "r" / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"q{i} {{x}}?", "reference": "", "base": b, "tuned": t} for i, (b, t) in enumerate(ANSWERS)]
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"name": "r", "storage": str(root), "model": {"base": "m"}, "data": {"train": [{"path": "p"}]}}
    asked = {"url": url, "model": "judge-1", **settings}
    return config.parse_run({**tree, "evaluate": {"judge": asked}}, "f")


def test_a_judge_that_prefers_the_longer_answer_finds_it_on_either_side(tmp_path: Path, longer: Endpoint) -> None:
    said = io.StringIO()
    with serving(longer) as url:
        found = judge(run_of(tmp_path, url), Console(said))
    assert (found.num_samples, found.wins, found.losses, found.ties) == (20, 12, 5, 3)
    assert (found.num_inconsistent, found.malformed) == (0, [])
    assert found.win_rate == wilson([1.0] * 12 + [0.0] * 5 + [0.5] * 3)
    assert len(longer.asked) == 40
    assert {(body["model"], body["temperature"]) for body in longer.asked} == {("judge-1", 0)}
    assert "better in 12, worse in 5, same in 3" in said.getvalue()
    tree = json.loads((tmp_path / "r/evaluate/judge.json").read_text())
    assert (tree["wins"], tree["win_rate"]["value"]) == (12, 13.5 / 20)
    assert len((tmp_path / "r/evaluate/judge.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_judge_that_prefers_a_place_gives_ties(tmp_path: Path, side: str) -> None:
    with serving(Endpoint(lambda a, b: f"[[{side}]]")) as url:
        found = judge(run_of(tmp_path, url), Console(io.StringIO()))
    assert (found.wins, found.losses, found.ties, found.num_inconsistent) == (0, 0, 20, 20)
    assert found.win_rate is not None
    assert found.win_rate.value == 0.5


def test_a_verdict_in_one_order_alone_is_a_tie(tmp_path: Path) -> None:
    with serving(Endpoint(lambda a, b: "[[A]]" if a.startswith("t") else "[[C]]")) as url:
        found = judge(run_of(tmp_path, url), Console(io.StringIO()))
    assert (found.wins, found.losses, found.ties, found.num_inconsistent) == (0, 0, 20, 20)


def test_replies_without_a_verdict_are_counted_and_named(tmp_path: Path) -> None:
    said = io.StringIO()
    strange = iter([None, "", "Both have merits.", {"x": 1}, "[[D]]", *["I say [[A]]"] * 99])
    lock = threading.Lock()

    def say(a: str, b: str) -> object:
        with lock:
            return next(strange)

    with serving(Endpoint(say)) as url:
        found = judge(run_of(tmp_path, url), Console(said))
    assert 3 <= len(found.malformed) <= 5
    assert found.ties == 20 - len(found.malformed)
    assert found.win_rate is not None
    assert found.win_rate.num == 20 - len(found.malformed)
    assert f"samples {', '.join(map(str, found.malformed))} (see judge.jsonl)" in said.getvalue()


def test_bodies_that_are_no_completion_are_malformed_too(tmp_path: Path, longer: Endpoint) -> None:
    longer.before = [(200, {}, b"<html>"), (200, {}, b"[]"), (200, {}, b'{"choices": []}'), (200, {}, b"\xff")]
    with serving(longer) as url:
        run = run_of(tmp_path, url)
        found = judge(run, Console(io.StringIO()))
        assert 2 <= len(found.malformed) <= 4
        assert judge(run, Console(io.StringIO())).malformed == [], "malformed ones are not asked again"
    assert len(longer.asked) == 40 + 2 * len(found.malformed)


def test_a_judge_that_is_busy_or_failing_is_asked_again(tmp_path: Path, longer: Endpoint) -> None:
    longer.before = [
        (429, {"retry-after": "0"}, b""),
        (503, {}, b"x"),
        (500, {}, b""),
        (502, {"retry-after": "x"}, b""),
    ]
    with serving(longer) as url:
        found = judge(run_of(tmp_path, url), Console(io.StringIO()))
    assert (found.wins, found.losses, found.ties) == (12, 5, 3)
    assert len(longer.asked) == 44


def test_a_judge_that_stays_down_ends_the_command_and_the_next_one_continues(tmp_path: Path, longer: Endpoint) -> None:
    longer.before = [completion("[[A]]")] * 20
    longer.refuse = lambda _: (503, {}, b"")
    with serving(longer) as url:
        run = run_of(tmp_path, url)
        with pytest.raises(RunError, match=r"failed 7 times in a row \(status 503\); run the same command again"):
            judge(run, Console(io.StringIO()))
        kept = len((tmp_path / "r/evaluate/judge.jsonl").read_text().splitlines())
        assert kept >= 5
        longer.refuse, before = lambda _: None, len(longer.asked)
        judge(run, Console(io.StringIO()))
        late = NUM_AT_ONCE  # asked by the first command at its end, and noticed here afterwards
        assert 0 <= len(longer.asked) - before - (40 - 2 * kept) <= late
        before = len(longer.asked)
        judge(run_of(tmp_path, url, model="judge-2"), Console(io.StringIO()))
        assert len(longer.asked) - before == 40, "another judge's verdicts were taken"


def test_nobody_at_the_address_is_one_sentence(tmp_path: Path, longer: Endpoint) -> None:
    with serving(longer) as url:
        run = run_of(tmp_path, url)
    with pytest.raises(RunError, match="failed 7 times in a row"):
        judge(run, Console(io.StringIO()))


def test_a_model_that_takes_no_temperature_is_asked_without(tmp_path: Path, longer: Endpoint) -> None:
    refusal = (400, {}, b'{"error": {"message": "Unsupported value: temperature"}}')
    longer.refuse = lambda body: refusal if "temperature" in body else None
    with serving(longer) as url:
        found = judge(run_of(tmp_path, url), Console(io.StringIO()))
    assert found.wins == 12
    assert "temperature" not in longer.asked[-1]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses with status 401; check the key in JUDGE_KEY"),
        (403, "check the key in JUDGE_KEY"),
        (404, "check evaluate.judge.url and whether it has the model judge-1"),
        (400, "refuses with status 400"),
        (302, "refuses with status 302"),
    ],
)
def test_a_refusal_ends_the_command_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longer: Endpoint, status: int, words: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    longer.refuse = lambda _: (status, {"location": "http://127.0.0.1:9/"}, f"wrong key: {KEY}".encode())
    with serving(longer) as url, pytest.raises(RunError) as error:
        judge(run_of(tmp_path, url, key_env="JUDGE_KEY"), Console(io.StringIO()))
    assert words in str(error.value)
    assert KEY not in str(error.value)
    assert len(longer.asked) <= NUM_AT_ONCE


def test_the_key_is_sent_and_is_in_no_file_and_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, longer: Endpoint
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    said = io.StringIO()
    longer.before = [(429, {}, KEY.encode())]
    with serving(longer) as url, caplog.at_level("DEBUG"):
        judge(run_of(tmp_path, url, key_env="JUDGE_KEY"), Console(said))
    assert set(longer.keys) == {f"Bearer {KEY}"}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written.decode() + said.getvalue() + caplog.text
    with serving(longer) as url:
        longer.keys.clear()
        judge(run_of(tmp_path, url), Console(said))
    assert set(longer.keys) == {None}


def test_no_more_pairs_are_asked_than_wanted_and_the_same_ones_each_time(tmp_path: Path, longer: Endpoint) -> None:
    with serving(longer) as url:
        found = judge(run_of(tmp_path, url, samples=6), Console(io.StringIO()))
        assert found.num_samples == 6
        assert len(longer.asked) == 12
        judge(run_of(tmp_path, url, samples=8), Console(io.StringIO()))
    assert len(longer.asked) == 16, "pairs were asked again"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("… [[A]]", "A"),
        ("[[A]] at first, but then [[B]]", "B"),
        ("[[c]]", "C"),
        ("**B**", "B"),
        ("[A]", "A"),
        ("Tie.", "C"),
        ("A good answer", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_mark_or_the_only_word(text: str, verdict: str | None) -> None:
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "ftp://x"}, "evaluate.judge: url must be a URL such as https://api.example.com/v1"),
        ({"url": "x"}, "must be a URL"),
        ({"url": f"https://user:{KEY}@x/v1"}, "url must not contain a user, key or query"),
        ({"url": f"https://x/v1?key={KEY}"}, "set key_env instead"),
        ({"key_env": KEY}, "key_env must be the name of an environment variable .* not the key"),
        ({"key_env": "JUDGE_KEY"}, "key_env is JUDGE_KEY, but that variable is not set"),
        ({"key": KEY}, "unknown key evaluate.judge.key"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_asked(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(FtrayError, match=words) as error:
        judge(run_of(tmp_path, settings.pop("url", "http://127.0.0.1:9/v1"), **settings), Console(io.StringIO()))
    assert error.value.exit_code == 2
    assert KEY not in str(error.value)


def test_no_judge_and_no_answers_are_told(tmp_path: Path) -> None:
    run = run_of(tmp_path, "http://127.0.0.1:9/v1")
    (tmp_path / "r/evaluate/generations.jsonl").unlink()
    with pytest.raises(ConfigError, match="there are no answers to compare"):
        judge(run, Console(io.StringIO()))
    plain = run.model_copy(update={"evaluate": config.EvaluateConfig()})
    with pytest.raises(ConfigError, match=r"evaluate\.judge is missing; add evaluate\.judge: \{url"):
        judge(plain, Console(io.StringIO()))
