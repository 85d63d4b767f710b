"""What `ftray plan` says before a run is what was measured: memory within 10%, time within 15%, on one H200."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftray import config
from ftray.cli import main
from ftray.data.prepare import SUMMARY, _settings_of
from ftray.errors import ConfigError, ModelError, RunError
from ftray.events.event_log import LoggedEvent
from ftray.events.types import TrainingStarted
from ftray.model.fp8 import FORMATS
from ftray.report.gpu_specs import CARDS, NEEDED, check_accelerator, does, tokens_per_s
from ftray.report.model_shape import KNOWN, ModelShape, read_shape, shape_of
from ftray.report.plan import (
    MemoryParts,
    ProbeResult,
    TrainingLength,
    advise,
    candidate_for,
    make_plan,
    memory_of,
    parts_of,
    together,
)
from ftray.report.plan_text import as_text
from ftray.report.probe import STEPS, WARM_UP, probe_of, probed
from ftray.train.memory import GIB, MemoryChoice, state_bytes
from tests import tiny

DOC = Path(__file__).parents[2] / "docs/benchmarks.md"
H200 = CARDS["H200"]


def run_of(base: str = "meta-llama/Llama-3.1-8B", **sections: Any) -> config.RunConfig:
    tree = {"name": "p", "model": {"base": base}, "data": {"train": [{"path": "nowhere"}], "max_seq_len": 4096}}
    return config.parse_run({**tree, "deepspeed": {"zero_stage": 0}, **sections}, "test")


def shape(name: str) -> ModelShape:
    base = {"1B": "Llama-3.2-1B", "3B": "Llama-3.2-3B", "8B": "Llama-3.1-8B"}[name]
    return shape_of(config.ModelConfig(base=f"meta-llama/{base}"))


def predicted(
    name: str, method: str, seq: int, rows: int, batch: int, recomputed: int = 0, stage: int = 0, workers: int = 1
) -> tuple[float, float]:
    """(GiB, tokens/s on each GPU) of one candidate to train."""
    kind, _, optimizer = method.partition(", ")
    run = run_of(
        data={"train": [{"path": "nowhere"}], "max_seq_len": seq},
        method={"type": kind},
        train={"global_batch_size": batch, "optimizer": optimizer or "adamw"},
        deepspeed={"zero_stage": stage},
        scale={"num_workers": workers},
    )
    found = shape(name)
    fit = MemoryChoice(rows, recomputed, found.num_layers)
    parts = parts_of(run, found, memory_of(run, found, H200, workers), fit, workers)
    speed = tokens_per_s(run, found, H200, workers, rows * seq, recomputed / found.num_layers)
    return parts.total / GIB, speed


def chosen_by_memory() -> list[Any]:
    """The table of docs/benchmarks.md that `bench.fit_trial` gave: what was chosen, and the same with all recomputed."""
    found = []
    for line in DOC.read_text().splitlines():
        cells = [cell.strip().replace("`", "").replace(",", "") for cell in line.strip("|").split("|")]
        if len(cells) == 10 and re.fullmatch(r"\d+ of \d+", cells[4]):
            name, method, seq, rows, recomputed, peak, speed, _, other_peak, other_speed = cells
            method = method.replace("QLoRA", "qlora").replace("LoRA", "lora").replace("full adamw", "full, adamw")
            some, layers = (int(n) for n in recomputed.split(" of "))
            for count, gib, tokens in ((some, peak, speed), (layers, other_peak, other_speed)):
                if gib:
                    case = (name, method, int(seq), int(rows), 8, count)
                    found.append(pytest.param(case, float(gib), float(tokens), id=f"{'-'.join(cells[:4])}-{count}"))
    return found


# Through `ftray train`, and the step alone, of the other tables there.
OTHERS = [
    (("3B", "full", 4096, 4, 16), 84.3, 29_229),
    (("8B", "full, adamw-8bit", 4096, 2, 16), 99.0, 13_038),
    (("8B", "lora", 4096, 4, 8), 86.3, 16_959),
    (("8B", "qlora", 4096, 4, 8), 76.6, 16_753),
    (("8B", "lora", 4096, 4, 16, 0, 1), 88.0, 16_029),
    (("8B", "lora", 4096, 4, 32, 0, 1, 2), 87.7, 16_080),
    (("8B", "lora", 4096, 1, 16), 33.7, 16_292),
    (("8B", "lora", 4096, 2, 16), 51.8, 16_737),
    # Two cards: through `ftray train` (ZeRO-1, 2), and by `bench.zero_speed` (ZeRO-3).
    (("3B", "full", 4096, 4, 16, 0, 1, 2), 73.2, 27_463),
    (("3B", "full", 4096, 4, 16, 0, 2, 2), 69.3, 26_833),
    (("3B", "full", 4096, 4, 16, 0, 3, 2), 69.2, 24_484),
    (("8B", "full", 4096, 2, 8, 0, 3, 2), 101.2, 10_014),
    # Settings by hand of `bench.fit_trial`: half of the layers recomputed, or all of them with more rows.
    (("1B", "lora", 16384, 8, 8, 8), 92.2, None),
    (("3B", "lora", 16384, 4, 8, 14), 95.4, None),
    (("8B", "lora", 16384, 2, 8, 16), 92.9, None),
    (("8B", "full, adamw-8bit", 16384, 2, 8, 16), 138.1, None),
    (("3B", "lora", 16384, 8, 8, 28), 40.4, None),
    (("8B", "lora", 16384, 4, 8, 32), 41.9, 12_128),
    (("8B", "full, adamw-8bit", 16384, 4, 8, 32), 87.2, 10_962),
]


def test_the_table_is_read() -> None:
    assert len(chosen_by_memory()) == 28


@pytest.mark.parametrize(("case", "peak", "speed"), [*chosen_by_memory(), *OTHERS])
def test_memory_and_time_are_near_what_was_measured(case: tuple[Any, ...], peak: float, speed: float | None) -> None:
    gib, tokens = predicted(*case)
    assert gib == pytest.approx(peak, rel=0.05)
    assert speed is None or tokens == pytest.approx(speed, rel=0.15)


@pytest.mark.parametrize(
    ("name", "method", "rows", "speed", "peak"),
    [
        ("8B", {"type": "lora", "base_precision": "fp8"}, 4, 22_422, 86.4),
        ("8B", {"type": "lora", "base_precision": "int8"}, 4, 17_891, 87.6),
        ("3B", {"type": "full", "base_precision": "fp8"}, 4, 32_651, 84.3),
        ("8B", {"type": "full", "base_precision": "fp8"}, 2, 15_049, 99.1),
    ],
)
def test_products_in_8_bits_are_as_fast_as_was_measured(
    name: str, method: dict[str, str], rows: int, speed: float, peak: float
) -> None:
    optimizer = "adamw-8bit" if (name, method["type"]) == ("8B", "full") else "adamw"
    run = run_of(method=method, train={"global_batch_size": 8, "micro_batch_size": rows, "optimizer": optimizer})
    candidate = candidate_for(run, shape(name), H200, 1)
    assert candidate.tokens_per_s == pytest.approx(speed, rel=0.1)
    assert candidate.parts.total / GIB == pytest.approx(peak, rel=0.05)


def test_a_peak_is_not_below_what_an_update_needs() -> None:
    """Without accumulation gradients come as activations go, but in the update all of them are there."""
    for name, stage, workers, rows in (("8B", 1, 4, 4), ("3B", 1, 2, 2), ("3B", 3, 2, 2)):
        sizes = {"global_batch_size": rows, "micro_batch_size": 1}
        settings: dict[str, Any] = {"deepspeed": {"zero_stage": stage}, "scale": {"num_workers": workers}}
        run = run_of(method={"type": "full"}, train=sizes, **settings)
        found, states = shape(name), state_bytes(run, shape(name).num_parameters, workers, 1)
        memory = memory_of(run, found, H200, workers)
        parts = parts_of(run, found, memory, MemoryChoice(1, 0, found.num_layers), workers)
        assert parts.total >= memory.static + states.update
        assert parts.total <= memory.peak(4096, 0)


@pytest.mark.parametrize(
    ("name", "method", "rows", "layers"),
    [
        ("1B", "lora", 8, 0),
        ("3B", "lora", 8, 0),
        ("8B", "lora", 4, 0),
        ("1B", "full", 8, 0),
        ("3B", "full", 8, 0),
    ],
)
def test_rows_and_recomputed_layers_are_those_that_training_chose(
    name: str, method: str, rows: int, layers: int
) -> None:
    run = run_of(method={"type": method}, train={"global_batch_size": 8})
    candidate = candidate_for(run, shape(name), H200, 1)
    assert (candidate.micro_batch_size, candidate.recomputed) == (rows, layers)
    assert candidate.fits


def test_a_shape_counts_the_weights_of_the_real_model(tmp_path: Path) -> None:
    tiny.write_tiny_model(tmp_path / "m")
    found = shape_of(config.ModelConfig(base=str(tmp_path / "m")))
    assert found.num_parameters == sum(p.numel() for p in tiny.make_model().parameters())
    assert shape("8B").num_parameters == 8_030_261_248
    assert shape("1B").num_parameters == 1_235_814_400
    assert shape("8B").num_trained(config.MethodConfig(type="lora", rank=16)) == 41_943_040
    assert (
        shape("8B").num_trained(config.MethodConfig(type="lora", rank=16, target_modules=["q_proj", "v_proj"]))
        == 6_815_744
    )
    assert shape("8B").num_trained(config.MethodConfig(type="prompt-tuning", num_virtual_tokens=10)) == 40_960
    assert set(KNOWN) == {"Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.3-70B"}


def test_a_base_that_is_no_picture_of_this_is_refused() -> None:
    tree = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    assert read_shape(tree, "b").query == 8
    with pytest.raises(ModelError, match=r"plan knows no models of this kind \(num_local_experts\)"):
        read_shape({**tree, "num_local_experts": 8}, "b")
    with pytest.raises(ModelError, match=r"its config\.json"):
        read_shape({"d_model": 8}, "b")
    with pytest.raises(ModelError, match=r"model\.base a/b/c is neither a directory here nor a hub id"):
        shape_of(config.ModelConfig(base="a/b/c"))
    with pytest.raises(ModelError, match=r"download its config\.json"):
        shape_of(config.ModelConfig(base="nobody/has-this"))


def test_more_gpus_share_what_their_stage_shares() -> None:
    def parts(stage: int, workers: int) -> MemoryParts:
        run = run_of(
            method={"type": "full"},
            train={"global_batch_size": 64, "micro_batch_size": 1},
            deepspeed={"zero_stage": stage},
            scale={"num_workers": workers},
        )
        return candidate_for(run, shape("8B"), H200, workers).parts

    one = parts(1, 1)
    assert parts(1, 8).optimizer == pytest.approx(one.optimizer / 8)
    assert parts(1, 8).gradients == one.gradients
    assert parts(2, 8).gradients == pytest.approx(one.gradients / 8)
    assert parts(2, 8).weights == one.weights
    assert parts(3, 8).weights == pytest.approx(one.weights / 8)


@pytest.fixture
def indexed(tmp_path: Path) -> tuple[config.RunConfig, Path]:
    run = run_of(
        storage=str(tmp_path),
        train={"global_batch_size": 10, "epochs": 2},
        scale={"num_workers": 2, "accelerator": "H200", "price_per_hour": 4},
    )
    data = tmp_path / "p/data"
    data.mkdir(parents=True)
    counts = {"num_records": 300, "num_tokens": 400_000, "num_trained_tokens": 1, "num_sequences": 100}
    tree = {"settings": _settings_of(run.data), "sequences_per_epoch": 100, "train": counts, "eval": None}
    (data / SUMMARY).write_text(json.dumps(tree))
    return run, tmp_path / "p"


def test_steps_time_and_cost_follow_from_the_index(indexed: tuple[config.RunConfig, Path]) -> None:
    run, run_dir = indexed
    plan = make_plan(run, str(run_dir))
    assert plan.length == TrainingLength(20, 100, 4000.0, 300, True)
    assert plan.seconds == pytest.approx(90 + 20 * 10 * 4000 / (2 * plan.choice.tokens_per_s))
    assert plan.cost == pytest.approx(plan.seconds / 3600 * 2 * 4)
    text = "\n".join(as_text(plan, run))
    assert "20 of 10 packed sequences of 4096 tokens, 100 packed sequences per epoch: 800 thousand tokens\n" in text
    assert "ESTIMATED" not in text
    assert "not measured" not in text
    for change in (
        {"max_seq_len": 2048},
        {"train_on": run.data.train_on.model_copy(update={"reasoning": False})},
        {"chunk_mb": 1},
    ):
        other = run.model_copy(update={"data": run.data.model_copy(update=change)})
        assert make_plan(other, str(run_dir)).length.num_steps is None, "that index is of other rows"


def test_virtual_tokens_count_as_often_as_a_row_holds_documents(tmp_path: Path) -> None:
    run = run_of(
        storage=str(tmp_path),
        method={"type": "prompt-tuning", "num_virtual_tokens": 100},
        train={"global_batch_size": 8, "micro_batch_size": 2, "gradient_checkpointing": "none", "max_steps": 5},
    )
    advised = "run `ftray data index` first"
    before = make_plan(run, str(tmp_path / "p"), "H200")
    assert advised in "\n".join(before.advice)
    data = tmp_path / "p/data"
    data.mkdir(parents=True)
    counts = {
        "num_records": 900,
        "num_tokens": 400_000,
        "num_trained_tokens": 1,
        "num_sequences": 100,
        "most_documents": 21,
    }
    tree = {"settings": _settings_of(run.data), "sequences_per_epoch": 100, "train": counts, "eval": None}
    (data / SUMMARY).write_text(json.dumps(tree))
    after = make_plan(run, str(tmp_path / "p"), "H200")
    longer = (4096 + 21 * 100) / (4096 + 100)
    assert after.choice.parts.activations == pytest.approx(longer * before.choice.parts.activations)
    assert after.choice.tokens_per_s < before.choice.tokens_per_s / longer**0.9
    assert advised not in "\n".join(after.advice)


def test_without_an_index_steps_are_guessed_and_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x" * 4096 * 45)
    run = run_of(data={"train": [{"path": str(tmp_path)}], "max_seq_len": 4096}, train={"global_batch_size": 2})
    plan = make_plan(run, str(tmp_path / "p"), "A100")
    assert (plan.length.sequences_per_epoch, plan.length.num_steps, plan.length.from_index) == (10, 5, False)
    text = "\n".join(as_text(plan, run))
    assert "ESTIMATED from file sizes" in text
    assert "1 × A100-40G of 39.4 GiB" in text
    assert "extrapolated from an H200 by data sheet, not measured" in text


def test_without_a_card_it_is_the_smallest_that_fits_and_the_others_are_shown() -> None:
    train = {"global_batch_size": 8, "max_steps": 5, "optimizer": "adamw-8bit"}
    run = run_of(method={"type": "full"}, train=train)
    plan = make_plan(run, "nowhere")
    assert plan.chose_card
    assert plan.choice.fits
    same = [
        candidate
        for candidate in plan.alternatives
        if (candidate.method, candidate.optimizer) == ("full", "adamw-8bit")
    ]
    smaller = [candidate for candidate in same if CARDS[candidate.card].gib < CARDS[plan.choice.card].gib]
    assert smaller
    assert not any(candidate.fits for candidate in smaller)
    assert {candidate.card for candidate in [*same, plan.choice]} == set(CARDS)
    text = "\n".join(as_text(plan, run))
    assert ", the smallest GPU that fits" in text
    assert "5 of 8 packed sequences of 4096 tokens: at most 164 thousand tokens" in text
    with pytest.raises(ConfigError, match="the card GTX is unknown; use --card with one of L4, "):
        make_plan(run_of(), "nowhere", "GTX")


def test_cards_that_lack_the_products_are_not_offered() -> None:
    method = {"type": "lora", "base_precision": "fp8"}
    plan = make_plan(run_of(method=method), "nowhere")
    named = {candidate.card for candidate in (plan.choice, *plan.alternatives)}
    assert (
        {"H100", "H200", "B200"}
        == {card.name for card in CARDS.values() if does(card, run_of(method=method).method)}
        >= named
    )
    with pytest.raises(
        ConfigError,
        match=r"method\.base_precision fp8 is not supported by A100-80G; remove it, or use one of H100, H200, B200",
    ):
        make_plan(run_of(method=method), "nowhere", "A100-80G")
    with pytest.raises(ConfigError, match="fp8 is not supported by A100-40G"):
        check_accelerator(run_of(method=method, scale={"accelerator": "A100"}))
    check_accelerator(run_of(method={**method, "base_precision": "int8"}, scale={"accelerator": "A100"}))
    check_accelerator(run_of(method=method, scale={"accelerator": "MI300X"}))
    assert {name: kind.capability for name, kind in FORMATS.items()} == NEEDED


def test_whole_logits_are_counted() -> None:
    plain, whole = (replace(shape("1B"), whole_logits=how) for how in (False, True))
    parts = [
        candidate_for(run_of(train={"global_batch_size": 4, "gradient_checkpointing": "none"}), each, H200, 1).parts
        for each in (plain, whole)
    ]
    tokens = 4 * 4096
    assert parts[1].activations - parts[0].activations == pytest.approx(4 * tokens * plain.vocabulary)
    assert parts[1].working > parts[0].working + 3 * tokens * plain.vocabulary


def test_what_does_not_fit_says_so_first_and_names_ways_that_do() -> None:
    run = run_of(method={"type": "full"}, train={"global_batch_size": 8, "max_steps": 5})
    plan = make_plan(run, "nowhere", "H100")
    assert not plan.choice.fits
    assert plan.advice[0].startswith("does not fit on H100")
    fitting = {(candidate.method, candidate.optimizer) for candidate in plan.alternatives if candidate.fits}
    assert fitting == {("lora", "adamw"), ("qlora", "adamw"), ("full", "adamw-8bit")}
    assert "THIS DOES NOT FIT" in "\n".join(as_text(plan, run))


@pytest.mark.parametrize(
    ("records", "sections", "words"),
    [
        (20, {}, "first try the best ones as few-shot examples"),
        (300, {}, "hardly knowledge"),
        (2000, {"method": {"type": "full"}}, "LoRA learns as much"),
        (2000, {"train": {"epochs": 9}}, "will overfit"),
        (2000, {}, "there is no eval set"),
    ],
)
def test_advice_follows_the_datas_size_and_kind(records: int, sections: dict[str, Any], words: str) -> None:
    run = run_of(**sections)
    candidate = make_plan(run, "nowhere", "B200").choice
    assert any(words in text for text in advise(run, TrainingLength(1, 1, 1.0, records, True), candidate))


def test_what_goes_together_is_what_check_allows() -> None:
    lines = together(run_of(train={"precision": "fp16", "global_batch_size": 8}, deepspeed={"zero_stage": 1}))
    assert (
        lines[0]
        == "full with fp16: zero_stage 1, 2, 3; not 0: DeepSpeed has no loss scaling at stage 0; use zero_stage 1"
    )
    assert lines[2].startswith("qlora with fp16: zero_stage 1, 2; not 0: ")
    assert "not 3: 4-bit weights can't be sharded; use zero_stage 2" in lines[2]


def test_the_verb_prints_text_and_json(
    indexed: tuple[config.RunConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(indexed[0].model_dump(mode="json", exclude_unset=True)))
    assert main.main(["plan", str(file), "--card", "H100", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["choice"]["card"] == "H100"
    assert tree["choice"]["parts"]["total"] == pytest.approx(
        sum(v for k, v in tree["choice"]["parts"].items() if k != "total")
    )
    assert tree["length"]["num_steps"] == 20
    assert main.main(["plan", str(file)]) == 0
    assert "before you train" in capsys.readouterr().out


def test_time_and_cost_are_by_a_probe_s_speed_where_there_is_one(tmp_path: Path) -> None:
    lines = [
        {"step": n, "num_tokens": 9000, "tokens_per_s": 1e6 if n < WARM_UP else 3000.0 + n} for n in range(STEPS)
    ]  # rows far from full
    start = LoggedEvent("1-a", 0.0, TrainingStarted(0, 10, 2, "NVIDIA H200"))
    found = probed(lines, [start])
    assert found == ProbeResult(3006.5 / 2, pytest.approx(9000 / 3006.5), 2, "NVIDIA H200", 6), (
        "the first steps are left out"
    )
    run = run_of(train={"max_steps": 100, "global_batch_size": 4}, scale={"num_workers": 2, "price_per_hour": 3.6})
    plan = make_plan(run, str(tmp_path), "H200", found)
    assert plan.seconds == pytest.approx(90 + 100 * 9000 / 3006.5)
    assert plan.cost == pytest.approx(plan.seconds / 3600 * 2 * 3.6)
    said = "\n".join(as_text(plan, run))
    assert (
        "measured   1,503 tokens/s on each of 2 × NVIDIA H200, over 6 steps of a probe; time and cost use this speed"
        in said
    )
    assert "measured " not in "\n".join(as_text(make_plan(run, str(tmp_path), "H200"), run))
    with pytest.raises(RunError, match="the probe recorded only 2 of 10 steps"):
        probed(lines[:2], [start])


def test_a_probe_is_the_run_itself_under_a_name_of_its_own(tmp_path: Path) -> None:
    run = run_of(
        train={"max_steps": 100},
        data={"train": [{"path": "x"}], "eval": {"fraction": 0.1}},
        evaluate={"every": 5},
        tracking={"trackers": ["tensorboard"]},
    )
    one, other = probe_of(run), probe_of(run)
    assert one.tracking.trackers == []
    assert len(probe_of(run.model_copy(update={"name": "n" * 63})).name) == 63
    assert one.name.startswith("p-probe-")
    assert one.name != other.name
    assert (one.train.max_steps, one.evaluate.every, one.tune) == (STEPS, None, None)
    assert (one.model, one.method, one.data, one.deepspeed, one.scale) == (
        run.model,
        run.method,
        run.data,
        run.deepspeed,
        run.scale,
    )
    config.parse_run(one.model_dump(mode="json"), "test")
