"""What records cost a model, how work is shared, gates, slices and the words for them; no Ray."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ftray import config, storage
from ftray.chat import ChatFormat, Conversation, Message
from ftray.cli import main, session
from ftray.config import FIGURES, Gate
from ftray.data.eval_examples import read_set
from ftray.driver.run_record import open_run
from ftray.errors import DataError
from ftray.evaluate import metrics, summary
from ftray.evaluate.plan import general_path
from ftray.evaluate.report import report
from ftray.evaluate.results import (
    Comparison,
    ModelScores,
    judge,
    read_results,
    settings_of,
    with_gates,
    write_results,
)
from ftray.evaluate.run import eval_data_of
from ftray.evaluate.score import ScoreResult, ScoreTask, merge, score, score_documents
from ftray.evaluate.stats import Difference
from ftray.model.lora import add_prompt
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.prompt_tuning import PromptTuning
from ftray.train.objectives.sft import Sft
from tests import tiny
from tests.cluster import make_run

CHAT = ChatFormat(tiny.make_tokenizer())
TURNS = [Conversation((Message("user", q), Message("assistant", a))) for q, a in tiny._pairs(12, 3)]


def documents() -> list[Any]:
    """Records as documents; the first has two, the last is plain text, of which all but the first token is learned."""
    found = [CHAT.encode_example(turns).documents() for turns in TURNS] + [
        CHAT.encode_text("A cow says moo.").documents()
    ]
    return [[*found[0], *found[1]], *found[2:]]


def cost(model: Any, document: Any) -> list[float]:
    """Summed loss, hits and supervised tokens of one document by a plain forward."""
    ids, mask = (torch.tensor(np.asarray(part)) for part in document)
    with torch.no_grad():
        logits = model(ids[None].long()).logits[0, :-1][mask[1:]]
    targets = ids[1:][mask[1:]].long()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return [float(loss), float((logits.argmax(-1) == targets).sum()), len(targets)]


@pytest.mark.parametrize("rows_at_once", [1, 3])
@pytest.mark.parametrize("max_seq_len", [16, 300])  # 16: every row is longer than that
def test_a_record_in_a_packed_row_costs_what_it_costs_alone(rows_at_once: int, max_seq_len: int) -> None:
    model, records = tiny.make_model(), documents()
    summed = ObjectiveModel(model, Sft(0.5)).eval()
    found = score_documents(summed, records, max_seq_len, rows_at_once, 1, torch.device("cpu"))
    expected = [np.sum([cost(model, d) for d in record], axis=0) for record in records]
    assert found == pytest.approx(np.array(expected), rel=1e-5)
    assert found[:, 1].sum() > 0


def test_each_record_sees_the_virtual_tokens_of_a_prompt_tuned_model() -> None:
    keys: Any = {"type": "prompt-tuning", "num_virtual_tokens": 5}
    model = add_prompt(tiny.make_model(seed=3), config.MethodConfig(**keys), seed=1)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(3)
    records = documents()[1:]
    found = score_documents(ObjectiveModel(model, PromptTuning()).eval(), records, 300, 1, 1, torch.device("cpu"))
    for sums, ((ids, mask),) in zip(found, records, strict=True):
        whole = torch.tensor([ids]).long()
        with torch.no_grad():
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, 5:-1]
        targets, learned = whole[0, 1:], torch.tensor(mask)[1:]
        loss = torch.nn.functional.cross_entropy(logits[learned], targets[learned], reduction="sum")
        hits = (logits.argmax(-1) == targets)[learned].sum()
        assert sums.tolist() == pytest.approx([float(loss), float(hits), int(learned.sum())], rel=1e-5)


@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_shares_put_together_are_the_whole(num: int) -> None:
    sizes = [4, 9, 2, 9, 30, 1, 7]
    examples = [[(np.full(n, i), np.ones(n, bool))] for i, n in enumerate(sizes)]
    work = ScoreTask(examples, examples[:3], [[i] * n for i, n in enumerate(sizes)])
    shares = [work.share(i, num) for i in range(num)]
    assert sorted(len(s.prompts) for s in shares)[-1] - sorted(len(s.prompts) for s in shares)[0] <= 1
    assert [len(p) for p in shares[0].prompts] == sorted((len(p) for p in shares[0].prompts), reverse=True)

    def fake(share: ScoreTask) -> ScoreResult:
        of = [
            np.array([[e[0][0][0], len(e[0][0]), 1.0] for e in each]).reshape(-1, 3)
            for each in (share.examples, share.general)
        ]
        return ScoreResult(
            of[0],
            of[1],
            [str(p[0]) for p in share.prompts],
            [len(p) for p in share.prompts],
            [0.5] * len(share.prompts),
            2.0,
        )

    found = merge([fake(share) for share in shares], work)
    assert found.tokens[:, 0].tolist() == list(range(7))
    assert found.tokens[:, 1].tolist() == sizes
    assert found.general[:, 0].tolist() == [0, 1, 2]
    assert found.answers == [str(i) for i in range(7)]
    assert found.num_tokens == sizes
    assert found.busy_s == 2.0 * num


def test_a_base_answers_and_is_scored_whatever_the_share(tmp_path: Path) -> None:
    tiny.write_tiny_model(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model", tmp_path)
    monitor = SimpleNamespace(record=SimpleNamespace(remote=lambda _: None))
    prompts = [CHAT.encode_prompt(turns.until(1)) for turns in TURNS]
    work = ScoreTask(documents(), documents()[:4], prompts)
    whole = score(run, None, work, monitor)
    parts = merge([score(run, None, work.share(i, 2), monitor) for i in range(2)], work)
    assert parts.answers == whole.answers
    assert len(set(whole.answers)) > 4
    assert parts.tokens == pytest.approx(whole.tokens, rel=1e-5)
    assert whole.general == pytest.approx(whole.tokens[:4], rel=1e-5)
    assert all(0 < s <= whole.busy_s for s in whole.seconds)
    model, tokenizer = tiny.make_model(), tiny.make_tokenizer()
    ids = torch.tensor([prompts[5]])
    out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=1)[
        0, ids.shape[1] :
    ]
    assert whole.answers[5] == tokenizer.decode(out, skip_special_tokens=True).strip()
    assert whole.num_tokens[5] == len(out)


def test_the_general_set_is_read_and_a_bad_record_is_named(tmp_path: Path) -> None:
    path = general_path(config.EvaluateConfig())
    samples = read_set(path, "evaluate.general", CHAT, 512)
    assert len(samples) == 60
    assert all(sample.is_question for sample in samples)
    (tmp_path / "g.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(
        DataError,
        match=r"evaluate\.general: .*g\.jsonl, line 2: completion is missing; the record has prompt; add the answer",
    ):
        read_set(str(tmp_path / "g.jsonl"), "evaluate.general", CHAT, 512)


def scores(**values: Any) -> ModelScores:
    return ModelScores(
        **{
            "num_trained_tokens": 10,
            "num_examples": 2,
            "num_answers": 2,
            "loss": 2.0,
            "perplexity": 7.4,
            "token_accuracy": 0.5,
            **values,
        }
    )


GATES = [
    # gate of a figure, base, tuned, passed
    ("rouge_l", {"min_gain": 0.02}, 0.3, 0.32, True),
    ("rouge_l", {"min_gain": 0.02}, 0.3, 0.319, False),
    ("loss", {"min_gain": 0.2}, 0.3, 0.1, True),  # in floats 0.3 - 0.1 is a little less than 0.2
    ("loss", {"min_gain": 0.2}, 0.1, 0.3, False),
    ("general_loss", {"max_rise": 0.05}, 2.0, 2.05, True),
    ("general_loss", {"max_rise": 0.05}, 2.0, 2.06, False),
    ("general_loss", {"max_rise": 0.05}, 2.0, 1.0, True),
    ("accuracy", {"max_drop": 0.1}, 0.9, 0.8, True),
    ("accuracy", {"max_drop": 0.1}, 0.9, 0.79, False),
    ("accuracy", {"min": 0.8}, 0.1, 0.8, True),
    ("accuracy", {"min": 0.8}, 0.9, 0.79, False),
    ("loss", {"max": 1.0}, 3.0, 1.0, True),
    ("loss", {"max": 1.0}, 3.0, 1.1, False),
    ("loss", {"max": 1.0}, 3.0, float("nan"), False),
    ("loss", {"min_gain": 0.0}, 3.0, float("nan"), False),
    ("bleu", {"min": 1.0}, None, None, False),
]


@pytest.mark.parametrize(("name", "limits", "base", "tuned", "passed"), GATES)
def test_a_gate_passes_at_its_limit_and_not_beyond(name: str, limits: Any, base: Any, tuned: Any, passed: bool) -> None:
    (result,) = judge({name: Gate(**limits)}, scores(**{name: base}), scores(**{name: tuned}))
    assert (result.figure, result.limit, result.passed) == (name, *limits, passed)


def statistics(values: list[list[float]]) -> dict[str, Any]:
    """Figures from made-up losses and answers' scores."""
    losses, given = (np.array(v) for v in values)
    return {
        **metrics.loss_figures(losses, np.ones(len(losses)), np.full(len(losses), 2.0)),
        "rouge_l": metrics.mean_of(given.tolist()),
    }


def test_each_group_has_the_figures_of_its_own_examples_and_answers() -> None:
    models = {
        "base": statistics([[4.0, 8, 2, 6], [0.1, 0.5, 0.2]]),
        "tuned": statistics([[2.0, 2, 2, 4], [0.9, 0.5, 0.3]]),
    }
    found = summary.slices_of("kind", ["a", "b", None, "a"], [0, 1, 3], models)
    assert {group: (t["num_examples"], t["num_answers"]) for group, t in found["groups"].items()} == {
        "(none)": (1, 0),
        "a": (2, 2),
        "b": (1, 1),
    }
    group = found["groups"]["a"]
    assert (group["base"]["loss"], group["tuned"]["loss"]) == ((4 + 6) / 4, (2 + 4) / 4)
    assert group["tuned"]["rouge_l"] == pytest.approx((0.9 + 0.3) / 2)
    assert group["difference"]["loss"].difference == -1
    assert "rouge_l" not in found["groups"]["(none)"]["tuned"]
    assert found["spread"]["loss"] == {"base": 4.0 - 1.0, "tuned": 1.5 - 1.0}
    assert found["spread"]["rouge_l"]["base"] == pytest.approx(0.5 - 0.15)


def test_the_verdict_names_what_is_better_worse_and_unsure() -> None:
    def d(value: float, reach: float) -> Difference:
        return Difference(value, value - reach, value + reach, 30, None, None, None)

    found = {
        "loss": d(-1, 0.5),
        "perplexity": d(-1, 0.5),
        "rouge_l": d(0.1, 0.2),
        "bleu": d(3, 1),
        "general_loss": d(0.2, 0.1),
    }
    pairs = {"tuned - base": found, "few_shot - base": {"chrf": d(0.0, 1)}}
    assert summary.verdict_of(pairs, "10% of tickets.jsonl") == [
        (
            "on 10% of tickets.jsonl, the tuned model is better by eval loss, BLEU; worse by general loss than the base; "
            "no statistically significant difference in ROUGE-L"
        ),
        (
            "on 10% of tickets.jsonl, the few-shot base is neither better nor worse than the base; "
            "no statistically significant difference in chrF"
        ),
    ]


def test_a_change_that_is_tiny_or_rests_on_few_examples_is_no_verdict() -> None:
    def d(value: float, number: int, ratio: float | None = None) -> Difference:
        return Difference(value, value - 1e-6, value + 1e-6, number, ratio, ratio, ratio)

    differences = {
        "loss": d(-0.012, 30, -0.0049),
        "general_loss": d(0.012, 30, 0.0051),
        "rouge_l": d(0.0049, 30),
        "chrf": d(0.49, 30),
        "bleu": d(0.51, 30),
        "exact_match": d(0.9, 29),
    }
    assert summary.verdict_of({"tuned - base": differences}) == [
        (
            "the tuned model is better by BLEU; worse by general loss than the base; less than 0.5% of difference in eval "
            "loss, ROUGE-L, chrF; fewer than 30 examples, which is too few to compare exact match"
        )
    ]


def test_a_verdict_names_its_data(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path, tmp_path / "tickets.jsonl")
    split = run.data.model_copy(update={"eval": config.SplitConfig(fraction=0.125)})
    assert eval_data_of(split) == f"12.5% of {run.data.train[0].path}"
    own = run.data.model_copy(update={"eval": [config.SourceConfig(path=f"e{i}") for i in range(4)]})
    assert eval_data_of(own) == "e0, e1, e2 …"


def comparison(run: config.RunConfig) -> Comparison:
    answers = {"base": ["red", "blue", "red", "none"], "tuned": ["red", "blue", "blue", "blue"]}
    wanted, labels = ["red", "blue", "blue", "red"], ["blue", "green", "red"]
    models = {
        name: metrics.loss_figures(np.array([3.0, 5.0, 1.0, 1.0]) * (1 + (name == "base")), np.ones(4), np.full(4, 2.0))
        | metrics.classify(said, wanted, labels)
        for name, said in answers.items()
    }
    tokens = np.full((4, 3), 2.0)
    base, tuned = (summary.scores_of(models[name], tokens) for name in ("base", "tuned"))
    differences = {"tuned - base": summary.differences_of(models["tuned"], models["base"])}
    slices = summary.slices_of("kind", ["x", "x", "y", "y"], [0, 1, 2, 3], models)
    classes = {name: metrics.class_table(said, wanted, labels) for name, said in answers.items()}
    return Comparison(
        12,
        run.config_hash,
        settings_of(run),
        base,
        tuned,
        None,
        differences,
        summary.verdict_of(differences),
        [],
        slices,
        classes,
    )


def test_results_are_read_as_they_were_written_and_other_versions_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path, tmp_path)
    found = with_gates(comparison(run), {"macro_f1": Gate(min_gain=0.5), "loss": Gate(min_gain=0.5)})
    write_results(found, str(tmp_path))
    assert read_results(str(tmp_path / "nothing")) is None
    again = read_results(str(tmp_path))
    assert again is not None
    assert (again.base, again.tuned, again.differences, again.gates) == (
        found.base,
        found.tuned,
        found.differences,
        found.gates,
    )
    assert [g.figure for g in again.missed] == ["macro_f1"]
    path = tmp_path / "evaluate/results.json"
    for text in (
        "{",
        "{}",
        '{"step": 1, "base": {"loss": 1}}',
        path.read_text().replace('"token_accuracy"', '"tokens"'),
    ):
        path.write_text(text)
        assert read_results(str(tmp_path)) is None


def test_the_exit_code_of_a_model_that_its_gates_refuse_is_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "ray_session", lambda _: nullcontext())  # all is computed already
    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    model, data = tiny.write_tiny_model(tmp_path / "model"), tiny.write_records(tmp_path / "data", 10)
    run = make_run(tmp_path / "runs", model, data, data__eval=[{"path": str(data)}])
    run_dir = Path(open_run(run, None))
    (tmp_path / "step").mkdir()
    (tmp_path / "step/state.json").write_text("{}")
    meta = {"progress": {"step": 12, "finished": True}}
    storage.commit_directory(tmp_path / "step", str(run_dir / "checkpoints/step-000012"), meta)
    write_results(comparison(run), str(run_dir))
    (run_dir / "evaluate/generations.jsonl").write_text("")
    (run_dir / "evaluate/speed.json").write_text("{}")
    assert main.main(["evaluate", str(run_dir)]) == 0
    assert main.main(["evaluate", str(run_dir), "evaluate.gates.loss.min_gain=0.5"]) == 0
    capfd.readouterr()
    assert main.main(["evaluate", str(run_dir), "evaluate.gates={loss: {min_gain: 99}, perplexity: {max: 1}}"]) == 3
    said = capfd.readouterr()
    assert said.err.startswith("ftray: the gates reject this model: loss gained ")
    assert said.err.count("\n") == 1
    assert said.out.count(": MISSED") == 2
    known = read_results(str(run_dir))
    assert known is not None
    assert [g.figure for g in known.missed] == ["loss", "perplexity"]


def test_the_report_says_all_of_it_in_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path, tmp_path)
    found = with_gates(comparison(run), {"macro_f1": Gate(min_gain=0.5)})
    speed = {
        "base": {"tokens_per_s": 80.0, "latency_p50_s": 0.25, "latency_p95_s": 0.5, "cost_per_1000_tokens": 0.0125}
    }
    text = "\n".join(report(found, speed))
    base, tuned = found.base, found.tuned
    for line in (
        f"eval loss       {base.loss:>10.4f}{tuned.loss:>10.4f}    -50.0%   -50.0% to -50.0%",
        f"accuracy        {base.accuracy:>10.4f}{tuned.accuracy:>10.4f}    +0.250",
        "(loss over 8 tokens of the eval set, other metrics over 4 answers; intervals by paired bootstrap)",
        "verdict: the tuned model is neither better nor worse than the base; fewer than 30 examples, which is too few to compare",
        "by kind (base → tuned)",
        "labels with the lowest F1 of the tuned model, of 3",
        "  1 × red classified as blue",
        "speed: base 80 tokens/s, an answer in 0.25 s (95% within 0.50 s), 0.0125 per 1,000 tokens",
        f"gate: {found.gates[0]}: MISSED",
    ):
        assert line in text
    assert str(found.gates[0]).startswith("macro_f1 gained 0.15, but needs at least 0.5")
    assert {f.title for f in FIGURES.values() if f.of == "classes"} == {"accuracy", "macro F1"}
