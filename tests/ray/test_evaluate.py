"""Three models side by side on real runs of a tiny model: figures as another implementation has them, gates, slices."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftray import config, console
from ftray.cli import main, session
from ftray.evaluate.results import Comparison, read_results
from ftray.evaluate.run import compare
from ftray.train.checkpoint.catalog import best_checkpoint
from ftray.train.checkpoint.restore import load_tuned
from tests import cluster, tiny

NUM_SHOTS, NUM_HELDOUT, NUM_ASKED = 2, 24, 8
PAIRS = [("Ada meets a cow. What is heard?", "Bo meets a cow. What is heard?"), ("Say moo.", "Say woof.")]


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    with cluster.local_ray():
        yield


def records(number: int, seed: int, shuffled: bool = False) -> list[dict[str, Any]]:
    """Questions with a column that says how many animals they name. shuffled: with another's answer each."""
    pairs = list(tiny._pairs(number, seed))
    answers = [a for _, a in pairs]
    if shuffled:
        random.Random(7).shuffle(answers)
    return [
        {
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
            "animals": "one" if q.count("then a") == 0 else "many",
        }
        for (q, _), a in zip(pairs, answers, strict=True)
    ]


def write(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base that has seen the task for a while, good and shuffled training data, held-out data, pairs."""
    root = tmp_path_factory.mktemp("parts")
    teach(root / "model")
    return {
        "model": root / "model",
        "good": write(root / "good.jsonl", records(200, 0)),
        "shuffled": write(root / "shuffled.jsonl", records(200, 0, shuffled=True)),
        "heldout": write(root / "heldout.jsonl", records(NUM_HELDOUT, 1)),
        "pairs": write(root / "pairs.jsonl", [{"a": a, "b": b} for a, b in PAIRS]),
    }


def teach(directory: Path, num_steps: int = 150) -> None:
    """The tiny model after a few steps of plain training on the task."""
    torch.manual_seed(0)
    model, tokenizer = tiny.make_model().train(), tiny.make_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    texts = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in records(8 * num_steps, 5)]
    for lo in range(0, len(texts), 8):
        batch = tokenizer(texts[lo : lo + 8], return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def run_of(parts: dict[str, Path], directory: Path, data: str, **overrides: Any) -> config.RunConfig:
    settings = {
        "data__eval": [{"path": str(parts["heldout"])}],
        "method__dropout": 0.0,
        "evaluate__metrics": ["loss", "rouge", "exact", "general"],
        "evaluate__num_generations": NUM_ASKED,
        "evaluate__max_new_tokens": 24,
        "evaluate__slices": "animals",
        **overrides,
    }
    return cluster.make_run(directory, parts["model"], parts[data], **settings)


class Trained:
    """A trained and compared run."""

    def __init__(self, run: config.RunConfig) -> None:
        self.run = run
        cluster.run_training(run)
        self.comparison, self.text = self.compare(run)

    def compare(self, run: config.RunConfig) -> tuple[Comparison, str]:
        stream = cluster.Watched()
        return compare(run, run.directory, console.Console(stream))[0], stream.getvalue()

    def lines(self, name: str) -> list[Any]:
        return [json.loads(line) for line in Path(self.run.directory, "evaluate", name).read_text().splitlines()]


@pytest.fixture(scope="module")
def good(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    settings = {
        "evaluate__few_shot": NUM_SHOTS,
        "evaluate__pairs": str(parts["pairs"]),
        "evaluate__price_per_hour": 3.6,
    }
    return Trained(run_of(parts, tmp_path_factory.mktemp("good"), "good", **settings))


def models_of(trained: Trained) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(trained.run.model.base, dtype=torch.float32).eval()
    tuned = load_tuned(trained.run, best_checkpoint(trained.run.directory), "fp32")
    return {"base": base, "few_shot": base, "tuned": tuned}


def shots_of(trained: Trained) -> list[dict[str, str]]:
    """The turns in front of the few-shot base's questions, found again: the first training records in their order."""
    from functools import partial

    from ftray.data.chunks import streams
    from ftray.data.eval_examples import pick_shots
    from ftray.data.index import build_index
    from ftray.model.load import load_tokenizer, tokenizer_hash

    load = partial(load_tokenizer, trained.run.model)
    stream, _ = streams(trained.run.data, load, trained.run.evaluate.slices)
    index = build_index(
        stream, int(trained.run.data.chunk_mb * 1e6), f"{trained.run.directory}/data", tokenizer_hash(load())
    )
    shots = pick_shots(index, stream, NUM_SHOTS, [])
    return [{"role": turn.role, "content": turn.content} for shot in shots for turn in shot]


def cost(model: Any, tokenizer: Any, before: list[Any], turns: list[Any]) -> tuple[float, int, int]:
    """Summed loss, hits and tokens of the answer by a plain forward of one conversation."""
    head = tokenizer.apply_chat_template([*before, *turns[:-1]], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    answer = tokenizer(turns[-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    targets = torch.tensor(answer)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return float(loss), int((logits.argmax(-1) == targets).sum()), len(answer)


def test_every_figure_is_that_of_a_second_implementation(good: Trained, parts: dict[str, Path]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer, shots = tiny.make_tokenizer(), shots_of(good)
    assert [turn["role"] for turn in shots] == ["user", "assistant"] * NUM_SHOTS
    heldout = {f"heldout.jsonl:{at}": r for at, r in offsets(parts["heldout"])}
    lines, generations = good.lines("examples.jsonl"), good.lines("generations.jsonl")
    assert sorted(line["id"] for line in lines) == sorted(heldout)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name, model in models_of(good).items():
        before = shots if name == "few_shot" else []
        sums = np.zeros(3)
        for line in lines:
            expected = cost(model, tokenizer, before, heldout[line["id"]]["messages"])
            assert (line[name]["loss"], line[name]["hits"], line["num_trained_tokens"]) == pytest.approx(
                expected, rel=1e-4
            )
            sums += expected
        scores = good.comparison.models[name]
        assert scores.loss == pytest.approx(sums[0] / sums[2], rel=1e-5)
        assert scores.perplexity == pytest.approx(np.exp(sums[0] / sums[2]), rel=1e-4)
        assert scores.token_accuracy == pytest.approx(sums[1] / sums[2])
        assert (scores.num_trained_tokens, scores.num_examples, scores.num_answers) == (sums[2], NUM_HELDOUT, NUM_ASKED)
        rouges, exact = [], []
        for g in generations:
            question = [*before, {"role": "user", "content": g["question"]}]
            head = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            ids = torch.tensor([tokenizer(head, add_special_tokens=False)["input_ids"]])
            out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=24, eos_token_id=1, pad_token_id=1)
            said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert g[name] == said
            rouges.append(scorer.score(g["reference"], said)["rougeL"].fmeasure)
            exact.append(float(said == g["reference"]))
            assert g["scores"][name]["rouge_l"] == pytest.approx(rouges[-1])
        assert scores.rouge_l == pytest.approx(np.mean(rouges))
        assert scores.exact_match == pytest.approx(np.mean(exact))


def offsets(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    at = 0
    for line in path.read_bytes().splitlines(keepends=True):
        yield at, json.loads(line)
        at += len(line)


def test_differences_slices_pairs_and_speed_say_what_the_lines_hold(good: Trained) -> None:
    found, lines = good.comparison, good.lines("examples.jsonl")
    assert list(found.differences) == ["tuned - base", "few_shot - base", "tuned - few_shot"]
    for pair, differences in found.differences.items():
        new, old = pair.split(" - ")
        for name, d in differences.items():
            values = [found.models[model].figure(name) for model in (new, old)]
            assert d.difference == pytest.approx(values[0] - values[1])
            assert d.low <= d.difference <= d.high
    groups = found.slices["groups"]
    assert {name: g["num_examples"] for name, g in groups.items()} == {
        name: sum(line["slice"] == name for line in lines) for name in ("one", "many")
    }
    for name, group in groups.items():
        mine = [line for line in lines if line["slice"] == name]
        loss = sum(line["tuned"]["loss"] for line in mine) / sum(line["num_trained_tokens"] for line in mine)
        assert group["tuned"]["loss"] == pytest.approx(loss)
    losses = [g["base"]["loss"] for g in groups.values()]
    assert found.slices["spread"]["loss"]["base"] == pytest.approx(max(losses) - min(losses))
    pairs = good.lines("pairs.jsonl")
    assert [(p["a"], p["b"]) for p in pairs] == PAIRS
    assert found.pairs["tuned"]["same"] == np.mean([p["tuned"]["a"] == p["tuned"]["b"] for p in pairs])
    speed = json.loads(Path(good.run.directory, "evaluate/speed.json").read_text())
    for s in speed.values():
        assert s["cost_per_1000_tokens"] == pytest.approx(0.001 * s["busy_s"] / s["num_tokens"] * 1000)
        assert s["latency_p50_s"] <= s["latency_p95_s"] <= s["busy_s"]
    assert "the tuned model is " in good.text
    assert "by animals (base → tuned)" in good.text


def test_known_figures_are_not_computed_again_and_gates_are_judged_anew(good: Trained) -> None:
    stamp = Path(good.run.directory, "evaluate/examples.jsonl").stat().st_mtime_ns
    gates = {"loss": config.Gate(min_gain=0.01), "general_loss": config.Gate(max_rise=-0.0, min=0.0)}
    run = good.run.model_copy(update={"evaluate": good.run.evaluate.model_copy(update={"gates": gates})})
    again, text = good.compare(run)
    assert "is already evaluated" in text
    assert Path(good.run.directory, "evaluate/examples.jsonl").stat().st_mtime_ns == stamp
    assert [(g.figure, g.limit) for g in again.gates] == [
        ("loss", "min_gain"),
        ("general_loss", "max_rise"),
        ("general_loss", "min"),
    ]
    assert read_results(good.run.directory) == again
    gain = again.base.loss - again.tuned.loss
    assert again.gates[0].value == pytest.approx(gain)


@pytest.mark.long
def test_a_model_tuned_on_shuffled_answers_is_refused_and_a_good_one_passes(
    good: Trained,
    parts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    bad = Trained(run_of(parts, tmp_path, "shuffled"))
    assert bad.comparison.base.loss == pytest.approx(good.comparison.base.loss)
    monkeypatch.setattr(session, "ray_session", lambda _: nullcontext())
    gates = ["evaluate.gates.loss.min_gain=0.01", "evaluate.gates.general_loss.max_rise=9"]
    assert main.main(["evaluate", good.run.directory, *gates]) == 0
    capfd.readouterr()
    assert main.main(["evaluate", bad.run.directory, *gates]) == 3
    said = capfd.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("ftray: the gates reject this model: loss gained -")
    assert "gate: loss gained" in said.out
    assert ": MISSED" in said.out
    known = read_results(bad.run.directory)
    assert known is not None
    assert [g.passed for g in known.gates] == [False, True]
    assert best_checkpoint(bad.run.directory).step == 12


def test_what_fewer_bits_cost_is_told_on_the_terminal_in_the_lineage_and_on_the_card(
    good: Trained, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import ModelCard

    monkeypatch.setattr(session, "ray_session", lambda _: nullcontext())
    assert main.main(["export", good.run.directory, "--quantize", "nf4"]) == 0
    said = capfd.readouterr().out
    place = Path(good.run.directory, "quantized/nf4")
    found = json.loads((place / "lineage.json").read_text())["quantized"]
    tuned = good.comparison.tuned
    assert found["loss_before"] == pytest.approx(tuned.loss, abs=1e-4), "the merged model's is the adapter's"
    assert found["num_trained_tokens"] == tuned.num_trained_tokens
    assert 0 < abs(found["loss_after"] - found["loss_before"]) < 0.25
    sentence = f"nf4: eval loss {found['loss_before']:.4f} → {found['loss_after']:.4f} ("
    assert sentence in said
    card = ModelCard((place / "MODEL_CARD.md").read_text())
    assert sentence in card.text
    assert "the metrics above are from before quantization" in card.text
    assert (card.data.library_name, card.data.tags) == ("transformers", ["ftray", "lora", "nf4"])
    parts = {
        part: ModelCard(Path(good.run.directory, "model", part, "MODEL_CARD.md").read_text()) for part in ("", "merged")
    }
    assert [parts[part].data.library_name for part in ("", "merged")] == ["peft", "transformers"]
    assert main.main(["export", good.run.directory, "--quantize", "nf4"]) == 0
    said = capfd.readouterr().out
    assert f"step {good.comparison.step} is already quantized to nf4" in said
    assert sentence in said
