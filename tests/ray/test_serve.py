"""A real endpoint on Ray Serve under the official client: answers, refusals, clients that leave, drain on SIGTERM."""

import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
import torch
from transformers import LlamaForCausalLM

from ftray.chat import ChatFormat, Conversation, Message
from ftray.config import ServeConfig
from ftray.engine.batch import generate_all
from ftray.engine.protocol import SamplingParams
from ftray.errors import ConfigError
from ftray.serve import proxy
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.run import Endpoint, run_until_signal, start_endpoint
from tests.cluster import ray_metric, ray_metrics, wait_for
from tests.unit.test_engine import byte_tokenizer, make_prompts, tiny_model

HI: Any = [{"role": "user", "content": "Grüß dich 🐦"}]


def endless_model() -> LlamaForCausalLM:
    """Never comes to an end token: streams are as long as a test asks for."""
    model = tiny_model(max_positions=1024)
    with torch.no_grad():
        model.lm_head.weight[byte_tokenizer().eos_token_id] = 0
    return model


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    directory = tmp_path_factory.mktemp("model")
    endless_model().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTRAY_API_KEY", "key one,key two")
        for name, value in proxy.SETTINGS.items():
            patch.setenv(name, value)
        ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False)
        try:
            # two at once (1.5 × 1, rounded up) and two that wait
            config = ServeConfig(port=0, target_ongoing_requests=1, max_queued_requests=2, max_tokens=1000)
            yield start_endpoint(directory, ServedModels("tiny"), config, num_cpus=0.5)
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key="key two", max_retries=0, timeout=60)


def test_served_greedy_answers_equal_offline_ones(client: openai.OpenAI) -> None:
    prompts = make_prompts(20)
    offline = generate_all(endless_model(), byte_tokenizer(), prompts, SamplingParams(max_tokens=24))

    def ask(prompt: list[int]) -> Any:
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0)

    with ThreadPoolExecutor(2) as pool:
        for answer, expected in zip(pool.map(ask, prompts), offline, strict=True):
            assert answer.choices[0].text == expected.text
            assert answer.choices[0].finish_reason == expected.finish_reason
            assert answer.usage.completion_tokens == len(expected.token_ids)


def test_a_chat_prompt_becomes_the_ids_of_training_and_streams_what_it_answers_at_once(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    prompt = ChatFormat(byte_tokenizer()).encode_prompt(Conversation((Message("user", HI[0]["content"]),)))
    expected = generate_all(endless_model(), byte_tokenizer(), [prompt], SamplingParams(max_tokens=30))[0]
    assert whole.choices[0].message.content == expected.text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(prompt)
    *chunks, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert last.usage == whole.usage


def test_a_seed_repeats_and_no_seed_does_not(client: openai.OpenAI) -> None:
    def text(**how: Any) -> str:
        return (
            client.completions.create(model="tiny", prompt="x", max_tokens=30, temperature=1.5, **how).choices[0].text
        )

    assert text(seed=5) == text(seed=5)
    assert len({text(), text(), text(seed=5)}) == 3


def test_several_answers_and_log_probabilities_reach_the_client(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 8, "temperature": 1.2, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 2
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 8
        assert all(entry.logprob <= entry.top_logprobs[0].logprob + 1e-6 <= 1e-5 for entry in choice.logprobs.content)
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**ask, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_models_are_listed_under_the_runs_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ftray"


def test_refusals_reach_the_client_as_its_own_errors(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as not_found:
        create(model="other", messages=HI)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="tiny", messages=HI, verbosity="low")
    assert (bad.value.param, bad.value.code) == ("verbosity", "unsupported")
    with pytest.raises(openai.BadRequestError) as many:
        create(model="tiny", messages=HI, n=1000)
    assert many.value.param == "n"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 1000, max_tokens=100)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError) as stranger:
        client.with_options(api_key="key").models.list()
    assert stranger.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="tiny", prompt="x" * (1 << 20))
    assert (large.value.status_code, large.value.code) == (413, "body_too_large")


def test_a_client_that_leaves_frees_the_engine(client: openai.OpenAI) -> None:
    long: Any = {"model": "tiny", "prompt": "x", "max_tokens": 900, "temperature": 0, "stream": True}
    begin = time.monotonic()
    assert len(list(client.completions.create(**long))) > 100
    whole_s = time.monotonic() - begin
    waits = []
    for _ in range(3):  # a busy machine may hold one up
        streams = [client.completions.create(**long) for _ in range(2)]  # all places are taken
        for stream in streams:
            next(iter(stream))
            stream.close()
        begin = time.monotonic()
        client.completions.create(model="tiny", prompt="x", max_tokens=1)
        waits.append(time.monotonic() - begin)
        if waits[-1] < whole_s / 3:
            break
    assert min(waits) < whole_s / 3  # had they stayed, each would have waited for one of them


def test_no_log_holds_a_prompt_or_an_answer(client: openai.OpenAI) -> None:
    secret: Any = {"model": "tiny", "prompt": "a-word-that-no-log-may-hold", "max_tokens": 40, "temperature": 0}
    client.completions.create(**secret)
    list(client.completions.create(**secret, stream=True))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{**secret, "stop": ["a-word-that-no-log-may-hold"] * 5})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{**secret, "prompt": secret["prompt"] * 100})
    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs")
    files = [path for path in logs.rglob("*") if path.is_file()]
    assert any("replica" in path.name for path in files)
    assert [path for path in files if b"a-word-that" in path.read_bytes()] == []


def test_beyond_its_queue_the_endpoint_answers_503_at_once(client: openai.OpenAI) -> None:
    def ask(_: int) -> tuple[int, bool]:
        try:
            client.completions.create(model="tiny", prompt="x", max_tokens=300, temperature=0)
        except openai.APIStatusError as err:
            return err.status_code, "retry-after" in err.response.headers
        return 200, True

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(ask, range(16)))
    assert {status for status, _ in outcomes} == {200, 503}
    assert all(told for _, told in outcomes)


def test_each_replicas_figures_are_among_rays_metrics(endpoint: Endpoint, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="x", max_tokens=3)
    asked = urllib.request.Request(
        endpoint.url.removesuffix("/v1") + "/metrics", headers={"Authorization": "Bearer key two"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        text = answer.read().decode()
    (own,) = re.findall(r'^ftray_answers_total{model="tiny",status="200"} (.*)$', text, re.MULTILINE)
    told = ("ray_ftray_answers_total", "model=tiny", "status=200")
    wait_for(lambda: ray_metric(*told) == float(own) > 0, "the replica's own figures")
    series = next(iter(ray_metrics("ray_ftray_first_token_seconds_bucket")))
    assert any(label.startswith("replica=") and len(label) > len("replica=") for label in series)
    assert any(label.startswith("le=") for label in series)
    assert ray_metric("ray_ftray_models") == 1


def test_a_second_endpoint_on_the_same_cluster_is_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="already serves an endpoint"):
        start_endpoint(tmp_path, ServedModels("other"), ServeConfig(port=0))


def test_on_sigterm_streams_end_and_then_the_endpoint_is_gone(endpoint: Endpoint, client: openai.OpenAI) -> None:
    """Last in this file: it ends the endpoint."""
    started, num_tokens, errors = threading.Event(), 0, []

    def read() -> None:
        nonlocal num_tokens
        usage: Any = {"include_usage": True}
        stream = client.completions.create(
            model="tiny", prompt="x", max_tokens=900, temperature=0, stream=True, stream_options=usage
        )
        try:
            for chunk in stream:
                started.set()
                num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
        except openai.OpenAIError as err:
            errors.append(err)

    def end() -> None:
        assert started.wait(120)
        while signal.getsignal(signal.SIGTERM) == before:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threads = [threading.Thread(target=read), threading.Thread(target=end)]
    for thread in threads:
        thread.start()
    run_until_signal(endpoint)
    for thread in threads:
        thread.join(120)
    assert (errors, num_tokens) == ([], 900)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
