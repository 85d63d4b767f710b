"""Each metric against its reference implementation, and how they are resampled."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from ftray.evaluate import metrics
from ftray.evaluate.metrics import Statistic
from ftray.evaluate.stats import difference

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "two",
    "dogs",
    "dog",
    "barked",
    "barks",
    "loudly",
    "at",
    "night",
]
LABELS = ["card_arrival", "Refund not showing up", "top up", "never seen"]


def texts(seed: int, number: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) + "." for _ in range(number)]


ANSWERS, REFERENCES = ["", *texts(0)], ["The cat.", *texts(1)]


def test_labels_that_differ_in_case_or_punctuation_only_are_told_apart() -> None:
    for labels, asked, wanted in (
        (["-1", "0", "1"], ["-1", "1", " 0 ", "-1.", "(1)", "'0'"], ["-1", "1", "0", "-1", metrics.OTHER, "0"]),
        (["C", "C++", "C#"], ["C", "C#", "c#.", "'C++'", "c"], ["C", "C#", "C#", metrics.OTHER, "C"]),
        (["yes", "Yes"], ["yes", "Yes", "YES"], ["yes", "Yes", metrics.OTHER]),
        (["+", "-"], ["-", "+", "*"], ["-", "+", metrics.OTHER]),
    ):
        assert [metrics.read_label(text, labels) for text in asked] == wanted
    assert metrics.classify(["1", "1"], ["-1", "1"], ["-1", "0", "1"])["accuracy"].scores == [0.0, 1.0]


def test_rouge_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    found = metrics.rouge(ANSWERS, REFERENCES)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    expected = [scorer.score(r, a) for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    for name, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        each = [e[theirs].fmeasure for e in expected]
        assert found[name].scores == each
        assert found[name].over() == pytest.approx(sum(each) / len(each), rel=1e-12)
    assert 0 < found["rouge_2"].over() < found["rouge_l"].over() < found["rouge_1"].over()


def test_bleu_and_chrf_over_the_corpus_are_those_of_sacrebleu() -> None:
    import sacrebleu

    corpus = (sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score, sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score)
    bleu, chrf = metrics.bleu(ANSWERS, REFERENCES), metrics.chrf(ANSWERS, REFERENCES)
    assert (bleu.over(), chrf.over()) == pytest.approx(corpus, rel=1e-12)
    some = np.array([3, 3, 5, 8, 20])
    part = [ANSWERS[i] for i in some], [[REFERENCES[i] for i in some]]
    assert bleu.over(some) == pytest.approx(sacrebleu.corpus_bleu(*part).score, rel=1e-12)
    assert chrf.over(some) == pytest.approx(sacrebleu.corpus_chrf(*part).score, rel=1e-12)
    assert bleu.scores is not None
    assert bleu.scores[7] == sacrebleu.sentence_bleu(ANSWERS[7], [REFERENCES[7]]).score


def test_bertscore_is_that_of_bert_score(tmp_path: Path) -> None:
    score = pytest.importorskip("bert_score", reason="needs the extra bertscore").score
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *dict.fromkeys(WORDS)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"), model_max_length=512).save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(tmp_path)
    found = metrics.bertscore(ANSWERS, REFERENCES, str(tmp_path))
    _, _, expected = score(ANSWERS[1:], REFERENCES[1:], model_type=str(tmp_path), num_layers=2)
    assert found.scores == pytest.approx([0.0, *expected.tolist()], abs=1e-6)


def test_classes_are_those_of_scikit_learn() -> None:
    rng = random.Random(0)
    references = [rng.choice(LABELS[:3]) for _ in range(60)]
    answers = [r if rng.random() < 0.5 else rng.choice([*LABELS[:3], "I don't know", ""]) for r in references]
    read = [a if a in LABELS else metrics.OTHER for a in answers]
    assert metrics.OTHER in read
    found = metrics.classify(answers, references, LABELS)
    assert found["accuracy"].over() == pytest.approx(accuracy_score(references, read))
    seen = sorted((set(references) | set(read)) - {metrics.OTHER})
    for places in (slice(None), np.array([1, 1, 4, 9, 30])):
        mine = np.arange(60)[places]
        some = [references[i] for i in mine], [read[i] for i in mine]
        names = [label for label in seen if label in some[0] or label in some[1]]
        assert found["macro_f1"].over(places) == pytest.approx(f1_score(*some, labels=names, average="macro"))
    table = metrics.class_table(answers, references, LABELS)
    assert table["confusion"] == confusion_matrix(references, read, labels=[*LABELS, metrics.OTHER]).tolist()
    precision, recall, f1, num = precision_recall_fscore_support(references, read, labels=LABELS, zero_division=0)
    assert table["per_class"]["top up"] == {"precision": precision[2], "recall": recall[2], "f1": f1[2], "num": num[2]}
    assert table["per_class"]["never seen"]["num"] == 0


def test_a_label_is_known_by_its_words_and_by_nothing_less() -> None:
    read = [metrics.read_label(text, LABELS) for text in ('"Top up".', "CARD_ARRIVAL", "card arrival", "top", "")]
    assert read == ["top up", "card_arrival", metrics.OTHER, metrics.OTHER, metrics.OTHER]


def test_what_a_pattern_finds_is_compared_as_a_number_where_it_is_one() -> None:
    pattern = r"#### (\S+)"
    reference = "16 - 3 = <<16-3=13>>13\n#### 1,300"
    answers = ["so #### 1300", "#### $1,300.00.", "#### 1300 and #### 7", "#### 130", "1300", "#### -1300"]
    assert metrics.extracted_match(answers, [reference] * 6, pattern).scores == [1, 1, 1, 0, 0, 0]
    assert metrics.extracted_match(["#### 42", "#### blue"], ["42", "red\n#### blue"], pattern).scores == [1, 1]
    assert metrics.extract("It is B, not C.", "[A-D]") == "B"
    found = [metrics.extract(text, "(.*)") for text in ("0.50", "+3", ".5", "$-2", "1,234,500", "12e", "-0")]
    assert found == ["0.5", "3", "0.5", "-2", "1234500", "12e", "0"]
    found = [metrics.extract(text, "(.*)") for text in ("1,2,3", "1,5", "12345678901234567", "100", "1e3")]
    assert found == ["1,2,3", "1,5", "12345678901234567", "100", "1e3"], "lists, other commas, all digits"


def test_exact_form_and_json() -> None:
    assert metrics.exact_match([" a\n", "a b", "A"], ["a", "a  b", "a"]).scores == [1, 0, 0]
    assert metrics.format_score(["Closes it.", "closes it.", "Closes it.\nYes."], r"[A-Z][^\n]*\.").scores == [1, 0, 0]
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
        "additionalProperties": False,
    }
    answers = [
        '{"name": "Ada", "age": 36}',
        '{"name": 3}',
        '{"name": "A", "x": 1}',
        "[1]",
        "{name: A}",
        "",
        "```json\n{}\n```",
    ]
    assert metrics.json_valid(answers, schema).scores == [1, 0, 0, 0, 0, 0, 0]
    assert metrics.json_valid(answers).scores == [1, 1, 1, 1, 0, 0, 0]


def test_loss_is_one_mean_over_all_tokens() -> None:
    found = metrics.loss_figures(np.array([2.0, 30.0]), np.array([1.0, 3.0]), np.array([4.0, 10.0]))
    assert found["loss"].over() == pytest.approx(32 / 14)
    assert found["perplexity"].over() == pytest.approx(math.exp(32 / 14))
    assert found["token_accuracy"].over() == pytest.approx(4 / 14)
    assert found["loss"].scores == [0.5, 3.0]
    huge = metrics.loss_figures(np.array([1e6]), np.array([0.0]), np.array([1.0]))["perplexity"]
    assert huge.over() == math.inf


def by_hand(new: Statistic, old: Statistic, number: int = 2000, seed: int = 5) -> tuple[float, float]:
    """The textbook's loop, with random numbers of its own."""
    rng = random.Random(seed)
    n, found = len(old.sums), []
    for _ in range(number):
        places = np.array(rng.choices(range(n), k=n))
        found.append(new.over(places) - old.over(places))
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def test_the_interval_is_that_of_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    old = rng.random(200)
    new = old + rng.normal(0.05, 0.1, 200)  # paired: their difference varies less than either
    pair = metrics.mean_of(new.tolist()), metrics.mean_of(old.tolist())
    found = difference(*pair)
    assert found.difference == pytest.approx((new - old).mean())
    error = (new - old).std() / math.sqrt(200)
    assert (found.low, found.high) == pytest.approx(
        (found.difference - 1.96 * error, found.difference + 1.96 * error), abs=0.15 * error
    )
    assert (found.low, found.high) == pytest.approx(by_hand(*pair), abs=0.15 * error)
    assert found.is_sure
    assert found.num == 200
    assert difference(*pair) == found
    assert not difference(pair[0], pair[0]).is_sure
    assert found.ratio == pytest.approx(new.mean() / old.mean() - 1)
    assert found.ratio_low is not None
    assert found.ratio_low < found.ratio < (found.ratio_high or 0)


def test_intervals_of_figures_over_the_corpus_are_resampled_over_the_corpus() -> None:
    better = [r if i % 2 else a for i, (a, r) in enumerate(zip(ANSWERS, REFERENCES, strict=True))]
    for metric in (metrics.bleu, metrics.chrf):
        pair = metric(better, REFERENCES), metric(ANSWERS, REFERENCES)
        found, expected = difference(*pair), by_hand(*pair, number=400)
        assert (found.low, found.high) == pytest.approx(expected, rel=0.15)
        assert found.is_sure
    rng = random.Random(2)
    wanted = [rng.choice(LABELS) for _ in range(80)]
    good, bad = ([w if rng.random() < share else rng.choice(LABELS) for w in wanted] for share in (0.8, 0.2))
    f1 = [metrics.classify(answers, wanted, LABELS)["macro_f1"] for answers in (good, bad)]
    found = difference(f1[0], f1[1])
    assert (found.low, found.high) == pytest.approx(by_hand(f1[0], f1[1], number=1000), rel=0.1)


def test_more_examples_than_fit_into_a_block_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    pair = [metrics.mean_of(rng.random(50).tolist()) for _ in range(2)]
    whole = difference(*pair)
    monkeypatch.setattr("ftray.evaluate.stats.BLOCK", 50 * 7)
    assert difference(*pair) == whole


def test_the_general_set_is_sixty_short_questions_each_once() -> None:
    path = Path(metrics.__file__).with_name("general.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(records) == len({r["prompt"] for r in records}) == 60
    assert all(set(r) == {"prompt", "completion"} and r["completion"].strip() for r in records)
    assert max(len(r["prompt"] + r["completion"]) for r in records) < 200
