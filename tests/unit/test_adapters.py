"""Many adapters over one base: batches of all of them answer as PEFT does alone; what doesn't fit is refused unread."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ftray.engine.batch import complete, generate_all
from ftray.engine.protocol import SamplingParams
from ftray.engine.transformers.engine import TransformersEngine
from ftray.engine.transformers.mixed_lora import MixedLora
from ftray.errors import ModelError
from tests.unit.test_engine import assert_same_but_for_ties, by_generate, byte_tokenizer, make_prompts, run, tiny_model

GREEDY = SamplingParams(max_tokens=24)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "narrow": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 8, "target_modules": ["up_proj", "o_proj"], "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 16, "target_modules": ["k_proj", "down_proj"], "use_dora": True},
}


def write_adapter(directory: Path, seed: int = 0, **options: Any) -> Path:
    """A random adapter of the tiny model, strong enough to change its answers."""
    settings = LoraConfig(**(options or KINDS["plain"]), init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    adapted = get_peft_model(tiny_model(), settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:  # away from what the norm would give, or DoRA changes nothing
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, seed, **kind) for seed, (name, kind) in enumerate(KINDS.items())}


def of_peft(directory: Path | None) -> Any:
    model = tiny_model()
    return model if directory is None else PeftModel.from_pretrained(model, directory).eval()


def with_adapters(body: Callable[[TransformersEngine], Awaitable[Any]], **options: Any) -> Any:
    async def work() -> Any:
        engine = TransformersEngine(tiny_model(), byte_tokenizer(), adapters=True, **options)
        await engine.start()
        try:
            return await body(engine)
        finally:
            await engine.stop()

    return run(work())


def test_mixed_batches_answer_as_each_adapter_does_alone_under_peft(adapters: dict[str, Path]) -> None:
    prompts = make_prompts(15)
    names = [None, *adapters]

    async def body(engine: TransformersEngine) -> Any:
        for name, directory in adapters.items():
            await engine.load_adapter(name, str(directory))
        work = [complete(engine, f"{i}", p, GREEDY, names[i % 5]) for i, p in enumerate(prompts)]
        return await asyncio.gather(*work)

    answers = with_adapters(body, max_num_seqs=8)
    models = {name: of_peft(adapters[name] if name else None) for name in names}
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        model = models[names[i % 5]]
        assert_same_but_for_ties(model, prompt, by_generate(model, prompt), answer.token_ids)
    for name in adapters:  # an adapter that changed nothing would prove nothing
        assert by_generate(models[name], prompts[0]) != by_generate(models[None], prompts[0]), name


def test_adapters_share_no_prefix_with_each_other_or_the_base(adapters: dict[str, Path]) -> None:
    """One prompt of several whole pages, asked again and again: each keeps its own keys and values."""
    prompt = list(range(200))
    order = [None, "plain", "dora", None, "dora", "plain"]

    async def body(engine: TransformersEngine) -> Any:
        for name, directory in adapters.items():
            await engine.load_adapter(name, str(directory))
        answers = [await complete(engine, f"{i}", prompt, GREEDY, name) for i, name in enumerate(order)]
        ledgers = [a.ledger for a in engine._manager.batch_processor.cache.cache_allocators.values()]
        return answers, sum(len(ledger.hash_to_block) for ledger in ledgers)

    answers, num_cached = with_adapters(body)
    assert num_cached == 0, "a cached prefix could serve a request of another adapter"
    models = {name: of_peft(adapters[name] if name else None) for name in order}
    expected = {name: by_generate(model, prompt) for name, model in models.items()}
    for name, answer in zip(order, answers, strict=True):
        assert_same_but_for_ties(models[name], prompt, expected[name], answer.token_ids)


def test_an_adapter_that_comes_again_with_other_weights_shares_no_prefix_with_the_old_ones(
    adapters: dict[str, Path],
) -> None:
    prompt, kinds = list(range(200)), ("plain", "dora")

    async def body(engine: TransformersEngine) -> Any:
        answers = []
        for kind in kinds:
            await engine.load_adapter("one", str(adapters[kind]))
            answers.append(await complete(engine, kind, prompt, GREEDY, "one"))
            await engine.unload_adapter("one")
        return answers

    for kind, answer in zip(kinds, with_adapters(body), strict=True):
        model = of_peft(adapters[kind])
        assert_same_but_for_ties(model, prompt, by_generate(model, prompt), answer.token_ids)


def test_adapters_are_not_mixed_over_a_base_in_whole_numbers(adapters: dict[str, Path]) -> None:
    model = tiny_model()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="adapters can't be mixed over a base in int8; serve the base in 16 bits"):
        MixedLora(model).load("plain", adapters["plain"])


def test_long_prompts_in_pieces_and_evicted_requests_keep_their_adapter(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftray.engine.transformers.engine._MAX_BATCH_TOKENS", 32)
    monkeypatch.setattr(TransformersEngine, "num_cache_tokens", lambda self: 64)
    prompts = [list(range(100)) + p for p in make_prompts(4)]
    names = [None, "plain", "dora", "plain"]
    params = SamplingParams(max_tokens=40)

    async def body(engine: TransformersEngine) -> Any:
        for name, directory in adapters.items():
            await engine.load_adapter(name, str(directory))
        work = [complete(engine, f"{i}", p, params, names[i]) for i, p in enumerate(prompts)]
        return await asyncio.gather(*work)

    for prompt, name, answer in zip(prompts, names, with_adapters(body, max_num_seqs=4), strict=True):
        model = of_peft(adapters[name] if name else None)
        assert_same_but_for_ties(model, prompt, by_generate(model, prompt, 40), answer.token_ids)


def test_an_adapter_that_is_unloaded_under_a_request_still_ends_it(adapters: dict[str, Path]) -> None:
    prompt, params = make_prompts(1)[0], SamplingParams(max_tokens=120)

    async def body(engine: TransformersEngine) -> Any:
        await engine.load_adapter("plain", str(adapters["plain"]))
        task = asyncio.create_task(complete(engine, "r", prompt, params, "plain"))
        await asyncio.sleep(0.05)
        await engine.unload_adapter("plain")
        assert engine.list_models() == ["model"]
        with pytest.raises(ModelError, match="plain is not loaded"):
            engine.generate("s", prompt, params, adapter="plain")
        return await task

    model = of_peft(adapters["plain"])
    answer = with_adapters(body)
    assert_same_but_for_ties(model, prompt, by_generate(model, prompt, 120), answer.token_ids)


def test_log_probabilities_are_the_models_own_greedy_or_sampled(adapters: dict[str, Path]) -> None:
    prompt = make_prompts(1)[0]
    asked = [
        SamplingParams(max_tokens=6, num_logprobs=3),
        SamplingParams(max_tokens=6, num_logprobs=0, temperature=1.3, seed=4),
        SamplingParams(max_tokens=6),
    ]

    async def body(engine: TransformersEngine) -> Any:
        await engine.load_adapter("plain", str(adapters["plain"]))

        async def told(i: int, params: SamplingParams) -> Any:
            return [one async for c in engine.generate(f"{i}", prompt, params, adapter="plain") for one in c.logprobs]

        return await asyncio.gather(*[told(i, params) for i, params in enumerate(asked)])

    greedy, sampled, none = with_adapters(body)
    assert none == []
    model = of_peft(adapters["plain"])
    for entries, num_top in ((greedy, 3), (sampled, 0)):
        assert len(entries) == 6
        ids = list(prompt)
        for entry in entries:
            with torch.no_grad():
                expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
            assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-4)
            assert [token for token, _ in entry.top] == expected.topk(num_top).indices.tolist()
            ids.append(entry.token_id)
    assert [e.token_id for e in greedy] == by_generate(model, prompt, 6)


def test_generate_all_leaves_no_hook_behind(adapters: dict[str, Path]) -> None:
    model = tiny_model()
    generate_all(model, byte_tokenizer(), make_prompts(2), GREEDY)

    async def body(engine: TransformersEngine) -> Any:
        return engine._model

    used = with_adapters(body)
    for module in [*model.modules(), *used.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


A, B = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: change_config(d, r=5), r"lora_A.weight has shape \[4, \d+\], expected \[5, \d+\] for this base"),
        (lambda d: change_config(d, r=4_000), "the rank is 1 to 1024"),
        (lambda d: change_config(d, peft_type="PROMPT_TUNING"), "only LoRA can be served"),
        (lambda d: change_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda d: change_config(d, rank_pattern={"q_proj": 8}), "rank_pattern"),
        (lambda d: change_config(d, use_dora=True), "lora_magnitude_vector"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "not a valid adapter config"),
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 100), "not a valid safetensors file"),
        (lambda d: change_weights(d, lambda t: t.pop(B)), "q_proj has lora_A instead of lora_A, lora_B"),
        (
            lambda d: change_weights(d, lambda t: t.update({B: torch.zeros(65, 4)})),
            r"has shape \[65, 4\], expected \[64, 4\]",
        ),
        (lambda d: change_weights(d, lambda t: t.update({"../../x": torch.zeros(1)})), "not part of LoRA"),
        (
            lambda d: change_weights(d, lambda t: t.update({k.replace(".1.", ".7."): t[k] + 0 for k in (A, B)})),
            "no linear layer model.layers.7.self_attn.q_proj",
        ),
        (lambda d: change_weights(d, lambda t: t[A].fill_(float("nan"))), "not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, break_it: Callable[[Path], Any], message: str
) -> None:
    directory = write_adapter(tmp_path / "a")
    break_it(directory)
    engine = TransformersEngine(tiny_model(), byte_tokenizer(), adapters=True)
    with pytest.raises(ModelError, match=message):
        asyncio.run(engine.load_adapter("a", str(directory)))
    assert engine.list_models() == ["model"]
