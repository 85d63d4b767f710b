"""The embedded engine: the same greedy tokens as generate(), whatever runs beside them; errors, never a hang."""

import asyncio
import gc
import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from ftray.engine.batch import complete, generate_all, load_engine
from ftray.engine.detokenizer import Detokenizer
from ftray.engine.protocol import ContextLengthError, EngineError, SamplingParams, SchemaError
from ftray.engine.structured_output import SchemaGuide
from ftray.engine.transformers.engine import TransformersEngine
from ftray.engine.transformers.sampling import sample_token
from ftray.errors import DataError, ModelError

GREEDY = SamplingParams(max_tokens=24)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters outside ASCII are spread over tokens."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0, max_positions: int = 256) -> LlamaForCausalLM:
    """Random weights, wide enough apart that greedy answers don't hang on rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_prompts(count: int = 20, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3 + (7 * i) % length,), generator=generator).tolist() for i in range(count)]


def by_generate(model: Any, prompt: list[int], max_tokens: int = 24, stop: list[int] | None = None) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=stop or [256], pad_token_id=256)
    with torch.no_grad():
        return model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()


def assert_same_but_for_ties(model: Any, prompt: list[int], expected: list[int], got: list[int]) -> None:
    if expected == got:
        return
    at = next(i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b)
    with torch.no_grad():
        best = model(torch.tensor([prompt + expected[:at]])).logits[0, -1].topk(2).values
    assert best[0] - best[1] < 1e-4, f"token {at} differs without a tie: {expected} {got}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return tiny_model()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """No test may hang: what takes this long never ends."""
    return asyncio.run(asyncio.wait_for(work, 60))


def with_engine(model: Any, tokenizer: Any, body: Any, **options: Any) -> Any:
    async def work() -> Any:
        engine = TransformersEngine(model, tokenizer, **options)
        await engine.start()
        try:
            return await body(engine)
        finally:
            await engine.stop()

    return run(work())


# Greedy answers


def gemma2(cap: float | None) -> Any:
    """Random weights; a cap of 1 on scores that go far beyond it."""
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma2Config(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        query_pre_attn_scalar=1,
        tie_word_embeddings=False,  # else each token is followed by itself
        attn_logit_softcapping=cap,
        sliding_window=8,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        **shape,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


@pytest.mark.parametrize("cap", [1.0, None])
def test_scores_that_a_model_caps_are_capped(tokenizer: Any, cap: float | None) -> None:
    model, prompts = gemma2(cap), make_prompts(6)
    expected = [by_generate(model, prompt) for prompt in prompts]
    for name in ("eager", "sdpa"):  # as training leaves it
        model.set_attn_implementation(name)
        answers = generate_all(model, tokenizer, prompts, GREEDY, max_num_seqs=3)
        assert model.config._attn_implementation == name
        model.set_attn_implementation("eager")
        for prompt, wanted, answer in zip(prompts, expected, answers, strict=True):
            assert_same_but_for_ties(model, prompt, wanted, answer.token_ids)


def test_greedy_tokens_equal_generate_one_by_one_and_eight_at_once(model: Any, tokenizer: Any) -> None:
    prompts = make_prompts()

    async def body(engine: TransformersEngine) -> Any:
        alone = [await complete(engine, f"a{i}", p, GREEDY) for i, p in enumerate(prompts)]
        together = await asyncio.gather(*[complete(engine, f"t{i}", p, GREEDY) for i, p in enumerate(prompts)])
        return alone, together

    alone, together = with_engine(model, tokenizer, body, max_num_seqs=8)
    for prompt, one, many in zip(prompts, alone, together, strict=True):
        expected = by_generate(model, prompt)
        assert_same_but_for_ties(model, prompt, expected, one.token_ids)
        assert_same_but_for_ties(model, prompt, expected, many.token_ids)
    assert len({tuple(answer.token_ids) for answer in alone}) == len(prompts)  # the model does tell prompts apart


def test_greedy_requests_are_untouched_by_sampled_ones_in_their_batch(model: Any, tokenizer: Any) -> None:
    prompts = make_prompts(12)

    async def body(engine: TransformersEngine) -> Any:
        params = [GREEDY if i % 2 else SamplingParams(max_tokens=24, temperature=1.5, seed=i) for i in range(12)]
        return await asyncio.gather(*[complete(engine, f"{i}", prompts[i], params[i]) for i in range(12)])

    answers = with_engine(model, tokenizer, body, max_num_seqs=6)
    for i in range(1, 12, 2):
        assert_same_but_for_ties(model, prompts[i], by_generate(model, prompts[i]), answers[i].token_ids)
    sampled = [answers[i].token_ids != by_generate(model, prompts[i]) for i in range(0, 12, 2)]
    assert all(sampled)


def count_evictions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    num_evictions = 0
    evict = OffloadingManager.offload_requests

    def count(manager: Any) -> Any:
        nonlocal num_evictions
        num_evictions += 1
        return evict(manager)

    monkeypatch.setattr(OffloadingManager, "offload_requests", count)
    return lambda: num_evictions


def test_greedy_tokens_survive_shared_prefixes_long_prompts_and_eviction(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache too small for four requests, and prefill in pieces of 32: requests are evicted and begun again."""
    monkeypatch.setattr("ftray.engine.transformers.engine._MAX_BATCH_TOKENS", 32)
    monkeypatch.setattr(TransformersEngine, "num_cache_tokens", lambda self: 64)
    num_evictions = count_evictions(monkeypatch)
    common = list(range(100))
    prompts = [common + p for p in make_prompts(4)]
    params = SamplingParams(max_tokens=90)
    answers = generate_all(model, tokenizer, prompts, params, max_num_seqs=4)
    assert num_evictions()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_same_but_for_ties(model, prompt, by_generate(model, prompt, 90), answer.token_ids)


def test_an_adapter_and_its_base_both_answer_as_generate_does(tokenizer: Any) -> None:
    peft = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    peft.eval()
    prompts = make_prompts(6)
    tuned = [answer.token_ids for answer in generate_all(peft, tokenizer, prompts, GREEDY)]
    with peft.disable_adapter():
        base = [answer.token_ids for answer in generate_all(peft, tokenizer, prompts, GREEDY)]
        for prompt, answer in zip(prompts, base, strict=True):
            assert_same_but_for_ties(peft, prompt, by_generate(peft, prompt), answer)
    for prompt, answer in zip(prompts, tuned, strict=True):
        assert_same_but_for_ties(peft, prompt, by_generate(peft, prompt), answer)
    assert base != tuned


# Sampling


def test_a_seed_repeats_an_answer_whatever_runs_beside_it(model: Any, tokenizer: Any) -> None:
    prompt = make_prompts(1)[0]
    params = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=7)

    async def body(engine: TransformersEngine) -> Any:
        alone = await complete(engine, "alone", prompt, params)
        others = [SamplingParams(max_tokens=16, temperature=1.0, seed=i) for i in (8, 9, -3)]
        return alone, await asyncio.gather(
            *[complete(engine, f"{i}", prompt, p) for i, p in enumerate([params, *others])],
            *[complete(engine, f"u{i}", prompt, SamplingParams(max_tokens=16, temperature=1.0)) for i in range(3)],
        )

    alone, together = with_engine(model, tokenizer, body)
    assert together[0] == alone
    assert len({tuple(answer.token_ids) for answer in together}) == 7


def test_sampled_tokens_follow_temperature_and_top_p() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    num_draws = 4000

    def frequencies(**how: float) -> list[float]:
        params = SamplingParams(max_tokens=1, seed=3, **how)  # type: ignore[arg-type]
        counts = Counter(int(sample_token(logits, params, position)) for position in range(num_draws))
        return [counts[token] / num_draws for token in range(4)]

    assert frequencies(temperature=2.0) == pytest.approx(torch.softmax(logits / 2, 0).tolist(), abs=0.03)
    # 0.644 + 0.237 reach 0.8: two tokens stay, in their proportion
    assert frequencies(temperature=1.0, top_p=0.8) == pytest.approx([0.731, 0.269, 0, 0], abs=0.03)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"stop": ("",)}]
)
def test_impossible_sampling_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        SamplingParams(**{"max_tokens": 1, **wrong})


# Text


def feed(stream: Detokenizer, ids: list[int]) -> list[str]:
    return [*[stream.push(token) for token in ids], stream.finish()]


def test_characters_come_whole_though_their_bytes_are_spread_over_tokens(tokenizer: Any) -> None:
    text = "grüß dich 🐦👩‍👩‍👧 日本語, e\u0301!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    pieces = feed(Detokenizer(tokenizer.decode), ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == "g"  # nothing is held back longer than it must


def test_a_character_cut_off_by_the_end_is_left_out(tokenizer: Any) -> None:
    ids = tokenizer("hi 🐦")["input_ids"]
    assert "".join(feed(Detokenizer(tokenizer.decode), ids[:-1])) == "hi "


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("say END. more", ("END.",), "say "),
        ("EN EN ENEND.", ("END.",), "EN EN EN"),
        ("aab aaab", ("aaab",), "aab "),
        ("ends in EN", ("END",), "ends in EN"),
        ("first of two", ("two", "of"), "first "),
        ("a 🐦🐦 b", ("🐦🐦",), "a "),
        ("END", ("END",), ""),
        ("line\n\nnext", ("\n\n", "\n\nn"), "line"),
    ],
)
def test_no_part_of_a_stop_string_is_ever_shown(
    tokenizer: Any, text: str, stop: tuple[str, ...], expected: str
) -> None:
    stream, shown = Detokenizer(tokenizer.decode, stop), ""
    for piece in feed(stream, tokenizer(text)["input_ids"]):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected
    assert stream.stopped == (text != expected)


def test_the_first_of_two_stop_strings_in_one_token_counts() -> None:
    words = ["say ", "x--y++z"]
    stream = Detokenizer(lambda ids: "".join(words[i] for i in ids), ("++", "--"))
    assert feed(stream, [0, 1]) == ["say ", "x", ""]


def test_a_stop_string_ends_the_request(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("hello")["input_ids"]
    whole = generate_all(model, tokenizer, [prompt], SamplingParams(max_tokens=60))[0]
    stop = next(c for c in whole.text[2:] if c not in ("\ufffd", *whole.text[:2]))
    answer = generate_all(model, tokenizer, [prompt], SamplingParams(max_tokens=60, stop=(stop,)))[0]
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert len(answer.token_ids) < len(whole.token_ids)
    assert whole.token_ids[: len(answer.token_ids)] == answer.token_ids


def test_the_end_token_stops_and_is_no_text(model: Any, tokenizer: Any) -> None:
    prompt = make_prompts(1)[0]
    tokens = by_generate(model, prompt)
    end = tokens[9]

    async def body(engine: TransformersEngine) -> Any:
        return [chunk async for chunk in engine.generate("r", prompt, GREEDY)]

    chunks = with_engine(model, tokenizer, body, stop_token_ids=(end,))
    expected = tokens[: tokens.index(end) + 1]
    assert [token for chunk in chunks for token in chunk.token_ids] == expected
    assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(expected[:-1]).rstrip("\ufffd")
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert (chunks[-1].num_prompt_tokens, chunks[-1].num_generated_tokens) == (len(prompt), len(expected))


# Limits, ends and deaths


def test_what_does_not_fit_is_refused_before_anything_is_queued(model: Any, tokenizer: Any) -> None:
    async def body(engine: TransformersEngine) -> None:
        assert engine.max_context == 256  # the model's own
        with pytest.raises(
            ContextLengthError, match=r"maximum context length is 256 tokens.* 257 tokens \(240 in the prompt, 17"
        ):
            engine.generate("r", [1] * 240, SamplingParams(max_tokens=17))
        with pytest.raises(DataError, match="outside the model's vocabulary"):
            engine.generate("r", [1, 260], GREEDY)
        with pytest.raises(DataError, match="empty"):
            engine.generate("r", [], GREEDY)
        assert engine._inboxes == {}
        fits = await complete(engine, "r", [1] * 240, SamplingParams(max_tokens=16))
        assert len(fits.token_ids) == 16

    with_engine(model, tokenizer, body)
    with pytest.raises(ContextLengthError):
        generate_all(model, tokenizer, [[1], [1] * 250], GREEDY)


def slow_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tenth of a second for each token."""
    model = tiny_model()

    def slow_forward(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return LlamaForCausalLM.forward(model, *args, **kwargs)

    monkeypatch.setattr(model, "forward", slow_forward)
    return model


def test_an_aborted_request_ends_and_frees_its_place(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = slow_model(monkeypatch)

    async def body(engine: TransformersEngine) -> None:
        long = SamplingParams(max_tokens=250)  # 25 seconds
        first = asyncio.create_task(complete(engine, "first", [1, 2], long))
        await asyncio.sleep(0.1)
        with pytest.raises(DataError, match="first is already running"):
            engine.generate("first", [1], GREEDY)
        await engine.abort("first")
        await engine.abort("unknown")
        with pytest.raises(EngineError, match="first was aborted"):
            await first
        for i in range(10):
            async for _ in engine.generate(f"second {i}", [1, 2], long):  # the client leaves after one token
                break
        gc.collect()  # an iterator that was left is closed when it is collected
        async with asyncio.timeout(15):  # the only place is free again
            await complete(engine, "third", [1, 2], SamplingParams(max_tokens=2))
        assert engine._inboxes == {}
        assert engine._manager.output_router.result_handlers == {}
        assert engine._manager.output_router.output_queue.qsize() <= 2  # nobody's last words pile up

    with_engine(model, tokenizer, body, max_num_seqs=1)


@pytest.mark.parametrize("death", [RuntimeError("out of memory"), SystemExit("not even an error")])
def test_a_dying_engine_tells_everybody_who_waits(
    tokenizer: Any, death: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    model = tiny_model()

    async def body(engine: TransformersEngine) -> None:
        num_calls = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls > 5:
                raise death
            return LlamaForCausalLM.forward(model, *args, **kwargs)

        monkeypatch.setattr(model, "forward", forward)
        requests = [complete(engine, f"{i}", p, GREEDY) for i, p in enumerate(make_prompts(6))]
        results = await asyncio.gather(*requests, return_exceptions=True)  # two run, four wait for a place
        assert [type(result) for result in results] == [EngineError] * 6
        with pytest.raises(EngineError, match="died"):
            engine.health()
        with pytest.raises(EngineError, match="died"):
            engine.generate("late", [1], GREEDY)

    with_engine(model, tokenizer, body, max_num_seqs=2)


def test_stopping_ends_the_thread_frees_the_cache_and_fails_what_runs(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, model = set(threading.enumerate()), slow_model(monkeypatch)

    async def work() -> None:
        engine = TransformersEngine(model, tokenizer)
        await engine.start()
        assert set(threading.enumerate()) - threads
        cache = weakref.ref(engine._manager.batch_processor.cache.cache_tensor)
        request = asyncio.create_task(complete(engine, "r", [1, 2], SamplingParams(max_tokens=200)))
        await asyncio.sleep(0.1)
        await engine.stop()
        with pytest.raises(EngineError):
            await request
        assert cache() is None
        with pytest.raises(EngineError, match="start it first"):
            engine.health()
        await engine.stop()

    run(work())
    assert {t for t in threading.enumerate() if t not in threads and not t.daemon} == set()


# Offline


def test_generate_all_keeps_order_reports_progress_and_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    prompts = make_prompts(10)
    num_done: list[int] = []
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    answers = generate_all(model, tokenizer, prompts, GREEDY, max_num_seqs=3, on_done=num_done.append)
    assert torch.equal(torch.rand(3), expected_draw)
    assert [module.training for module in model.modules()] == modes
    assert num_done == list(range(1, 11))
    assert model.config._attn_implementation == "sdpa"
    model.eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_same_but_for_ties(model, prompt, by_generate(model, prompt), answer.token_ids)
    assert generate_all(model, tokenizer, [], GREEDY) == []


def test_the_cache_is_sized_by_context_and_concurrency_not_by_free_memory(model: Any, tokenizer: Any) -> None:
    async def body(engine: TransformersEngine) -> int:
        return int(engine._manager.batch_processor.cache.cache_tensor.nbytes)

    bytes_per_token = 2 * 2 * 2 * 16 * 4  # layers · (key, value) · kv heads · head_dim · fp32
    size = with_engine(model, tokenizer, body, max_num_seqs=4)
    assert 4 * 256 * bytes_per_token <= size <= 2 * 4 * 256 * bytes_per_token


def test_a_saved_directory_loads_and_what_is_missing_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere is not a directory; .*ftray export"):
        load_engine(tmp_path / "nowhere")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks a tokenizer \(tokenizer.json\); .*ftray export"):
        load_engine(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = load_engine(tmp_path, name="tiny", num_threads=1)
    assert engine.list_models() == ["tiny"]
    assert engine.stop_token_ids == (tokenizer.eos_token_id,)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_engine(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"lacks config.json, weights \(\*.safetensors\); .*ftray export"):
        load_engine(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter without its base; .*ftray export"):
        load_engine(tmp_path)


def test_this_engine_holds_no_adapters(model: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(model, tokenizer)
    with pytest.raises(ModelError, match="ftray export"):
        asyncio.run(engine.load_adapter("a", "/a"))


# JSON schemas

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["size", "count"],
    "additionalProperties": False,
}


def test_answers_keep_to_their_schema_and_others_of_the_batch_are_untouched(model: Any, tokenizer: Any) -> None:
    prompts = make_prompts(4)
    kept = {"max_tokens": 60, "json_schema": json.dumps(SCHEMA)}
    asked = [
        SamplingParams(**kept),
        GREEDY,
        SamplingParams(**kept, temperature=1.5, seed=1),
        SamplingParams(**kept, temperature=1.5, seed=2, num_logprobs=1),
    ]

    async def body(engine: TransformersEngine) -> Any:
        return await asyncio.gather(*[complete(engine, str(i), prompts[i], asked[i]) for i in range(4)])

    answers = with_engine(model, tokenizer, body)
    for answer in (answers[0], *answers[2:]):
        found = json.loads(answer.text)
        assert (set(found), found["size"] in ("small", "large"), found["count"] in range(1000)) == (
            {"size", "count"},
            True,
            True,
        )
        assert answer.finish_reason == "stop"
    assert answers[1].token_ids == by_generate(model, prompts[1])


def test_a_schema_survives_eviction(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersEngine, "num_cache_tokens", lambda self: 64)
    num_evictions = count_evictions(monkeypatch)
    numbers = {
        "type": "array",
        "items": {"type": "integer", "minimum": 10, "maximum": 99},
        "minItems": 30,
        "maxItems": 30,
    }
    params = SamplingParams(max_tokens=100, json_schema=json.dumps(numbers))
    prompts = [list(range(100)) + prompt for prompt in make_prompts(4)]
    for answer in generate_all(model, tokenizer, prompts, params, max_num_seqs=4):
        assert len(json.loads(answer.text)) == 30
    assert num_evictions()


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "nonsense"}',
        '{"$ref": "https://example.org/x"}',
        "[1",
        '{"pattern": "("}',
        '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}',
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused(model: Any, tokenizer: Any, schema: str) -> None:
    async def body(engine: TransformersEngine) -> None:
        for work in (
            lambda: engine.check_schema(schema),
            lambda: engine.generate("x", [1], SamplingParams(max_tokens=9, json_schema=schema)),
        ):
            with pytest.raises(SchemaError, match="schema cannot be satisfied"):
                work()
        assert (await complete(engine, "y", [1], GREEDY)).token_ids

    with_engine(model, tokenizer, body)


def test_a_schema_that_gives_up_in_the_middle_ends_its_request_alone(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matcher has limits of its own, which a schema can reach only while an answer grows."""
    mask = SchemaGuide.mask

    class Tired:
        def consume_tokens(self, tokens: list[int]) -> bool:
            return False

        def get_error(self) -> str:
            return "too many items"

    def tire(guide: SchemaGuide, logits: torch.Tensor, token_ids: list[int]) -> None:
        if guide._num_consumed is not None:
            guide._matcher = Tired()
        mask(guide, logits, token_ids)

    monkeypatch.setattr(SchemaGuide, "mask", tire)
    asked = [SamplingParams(max_tokens=60, json_schema=json.dumps(SCHEMA)), GREEDY]

    async def body(engine: TransformersEngine) -> Any:
        work = [complete(engine, str(i), make_prompts(2)[i], params) for i, params in enumerate(asked)]
        return await asyncio.gather(*work, return_exceptions=True)

    failed, other = with_engine(model, tokenizer, body)
    assert isinstance(failed, EngineError)
    assert "too many items" in str(failed)
    assert other.token_ids == by_generate(model, make_prompts(2)[1])
