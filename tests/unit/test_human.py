"""People compare answers blinded: sides and slices balanced, the same sheet for a seed, ratings kept, figures right."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import random
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ftray import config, storage
from ftray.cli.main import main
from ftray.console import Console
from ftray.errors import ConfigError, RunHeldError
from ftray.evaluate.human.answers import Rating, RatingStore, from_csv, to_csv
from ftray.evaluate.human.results import alpha, as_text, results_of, verdict
from ftray.evaluate.human.server import MAX_BODY_BYTES, HumanEvalOptions, build_page, human, serving
from ftray.evaluate.human.sheet import Sheet, SheetKey, build_sheet, open_sheet, read_sheet
from ftray.evaluate.results import Generation, read_generations
from ftray.evaluate.stats import bootstrap, wilson
from tests.s3 import S3Server

SIZES = {"red": 60, "green": 30, "blue": 9, "rare": 1}


def lines(sizes: dict[str, int] | None = None) -> list[dict[str, Any]]:
    names = [name for name, size in (sizes or SIZES).items() for _ in range(size)]
    return [
        {"question": f"q{i}?", "reference": f"r{i}", "base": f"plain {i}", "tuned": f"=fine, {i}\n;", "slice": name}
        for i, name in enumerate(names)
    ]


def made(sizes: dict[str, int] | None = None) -> list[Generation]:
    return [Generation(g["question"], g["reference"], g["base"], g["tuned"], g["slice"]) for g in lines(sizes)]


def sheet_of(sizes: dict[str, int] | None = None, **settings: Any) -> tuple[Sheet, SheetKey]:
    return build_sheet(made(sizes), config.HumanEvalConfig(**settings))


def run_of(root: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> config.RunConfig:
    tree = {"name": "r", "storage": str(root), "model": {"base": "m"}, "data": {"train": [{"path": "p"}]}}
    found = config.parse_run({**tree, "evaluate": {"human": settings}}, "f")
    (root / "r" / "evaluate").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in (lines() if rows is None else rows))
    (root / "r" / "evaluate" / "generations.jsonl").write_text(text)
    return found


# The sheet


@pytest.mark.parametrize("number", [1, 2, 7, 20, 50, 99, 100, 1000])
def test_sides_are_balanced_over_all_and_within_slices(number: int) -> None:
    for seed in range(20):
        sheet, key = sheet_of(samples=number, seed=seed)
        assert len(sheet.samples) == len(key.tuned) == min(number, 100)
        assert abs(2 * key.tuned.count("a") - len(key.tuned)) <= len(key.tuned) % 2
        for name in SIZES:
            sides = [side for side, s in zip(key.tuned, key.slices, strict=True) if s == name]
            assert abs(2 * sides.count("a") - len(sides)) <= 2


def test_slices_have_their_share_and_none_is_left_out() -> None:
    shares = {name: sheet_of(samples=50)[1].slices.count(name) for name in SIZES}
    assert shares["rare"] == 1
    assert sum(shares.values()) == 50
    assert all(abs(shares[name] - size / 2) <= 1 for name, size in SIZES.items())
    assert sorted(sheet_of(samples=4)[1].slices) == sorted(SIZES)
    assert sheet_of(samples=3)[1].slices.count("rare") == 0


def test_each_sample_holds_both_answers_to_its_question_and_the_key_says_whose_is_whose() -> None:
    sheet, key = sheet_of(samples=100)
    found = set()
    for sample, side in zip(sheet.samples, key.tuned, strict=True):
        i = int(sample.question.strip("q?"))
        found.add(i)
        tuned, base = (sample.a, sample.b) if side == "a" else (sample.b, sample.a)
        assert (sample.reference, base, tuned) == (f"r{i}", f"plain {i}", f"=fine, {i}\n;")
    assert len(found) == 100


def test_neither_the_place_on_the_sheet_nor_the_slice_gives_a_side_away() -> None:
    sides = np.array([[side == "a" for side in sheet_of(seed=seed)[1].tuned] for seed in range(400)])
    assert np.all(abs(sides.mean(0) - 0.5) < 5 * 0.5 / math.sqrt(400)), "some place mostly has the tuned model on A"
    runs = (sides[:, 1:] == sides[:, :-1]).mean()
    assert abs(runs - 0.5) < 0.02, "sides alternate, or come in runs"
    slices = [sheet_of(seed=seed)[1].slices for seed in range(100)]
    first = [sheet.index("green") for sheet in slices]
    assert len(set(first)) > 3, "slices stand one after the other"


def test_a_seed_gives_one_sheet_and_another_seed_another() -> None:
    one, key = sheet_of(samples=20, seed=3)
    again, key_again = sheet_of(samples=20, seed=3)
    assert (one, key.tuned, key.slices) == (again, key_again.tuned, key_again.slices)
    other, other_key = sheet_of(samples=20, seed=4)
    assert (other.samples, other_key.tuned) != (one.samples, key.tuned)
    assert other.id != one.id
    assert sheet_of(samples=20, seed=3, criteria=["style"])[0].id != one.id


def test_the_sheet_of_a_seed_stays_what_it_was_in_earlier_versions() -> None:
    sheet, key = sheet_of(samples=8)
    assert [s.question for s in sheet.samples] == ["q25?", "q99?", "q34?", "q82?", "q50?", "q55?", "q65?", "q97?"]
    assert "".join(key.tuned) == "abbababa"


def test_lines_without_slices_make_a_sheet_and_a_slice_may_be_a_number(tmp_path: Path) -> None:
    plain = [{key: value for key, value in row.items() if key != "slice"} for row in lines()]
    run = run_of(tmp_path, plain, samples=10)
    assert set(open_sheet(str(tmp_path / "r"), run.evaluate.human)[1].slices) == {""}
    run_of(tmp_path, [{**row, "slice": i % 2, "id": i, "scores": {}} for i, row in enumerate(plain)], samples=10)
    assert open_sheet(str(tmp_path / "r"), run.evaluate.human)[1].slices.count("1") == 5


def test_the_sheet_in_storage_tells_no_side_and_outlives_a_second_command(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=10)
    sheet, key = open_sheet(str(tmp_path / "r"), run.evaluate.human)
    tree = json.loads((tmp_path / "r/evaluate/human/sheet.json").read_text())
    assert set(tree) == {"id", "criteria", "samples"}
    assert all(set(sample) == {"question", "reference", "a", "b"} for sample in tree["samples"])
    assert open_sheet(str(tmp_path / "r"), run.evaluate.human) == (sheet, key), "the address has changed"


def test_a_sheet_that_was_answered_is_never_replaced(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "r")
    run = run_of(tmp_path, samples=10)
    first = open_sheet(run_dir, run.evaluate.human)[0]
    second = open_sheet(run_dir, config.HumanEvalConfig(samples=11))[0]
    assert second.id != first.id, "nobody has answered yet"
    RatingStore(f"{run_dir}/evaluate/human", second).save("ann", {1: Rating(preferred="a")})
    with pytest.raises(ConfigError, match=r"holds ratings of another sheet.*move or delete that directory"):
        open_sheet(run_dir, run.evaluate.human)
    run_of(tmp_path, [{**row, "tuned": "another model"} for row in lines()], samples=11)
    with pytest.raises(ConfigError, match="holds ratings of another sheet"):
        open_sheet(run_dir, config.HumanEvalConfig(samples=11))
    there = read_sheet(run_dir)
    assert there is not None
    assert there[0] == second


def test_a_key_of_another_sheet_is_not_used(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=10)
    open_sheet(str(tmp_path / "r"), run.evaluate.human)
    key = tmp_path / "r/evaluate/human/key.json"
    key.write_text(json.dumps({**json.loads(key.read_text()), "sheet": "of another"}))
    assert read_sheet(str(tmp_path / "r")) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is missing, so there are no answers to compare; run `ftray evaluate` first"),
        ("", "is empty, so there are no answers"),
        ('{"question": "q", "base": "b"}\n', "is damaged; delete it"),
        ("{\n", "is damaged; delete it"),
        ("[1]\n", "is damaged; delete it"),
    ],
)
def test_answers_that_are_missing_or_damaged_are_told(tmp_path: Path, text: str | None, words: str) -> None:
    (tmp_path / "evaluate").mkdir()
    if text is not None:
        (tmp_path / "evaluate/generations.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_generations(str(tmp_path))


# Answers


def test_answers_survive_the_process_and_merge_by_sample(tmp_path: Path) -> None:
    sheet, _ = sheet_of(samples=5)
    answers = RatingStore(str(tmp_path), sheet)
    answers.save("Zoë / 1", {2: Rating(preferred="a", a={"style": 3})})
    answers.save("Zoë / 1", {5: Rating(preferred="same")})
    answers.save("Zoë / 1", {2: Rating(preferred="b")})
    answers.save("../bob", {1: Rating(b={"safety": 1})})
    again = RatingStore(str(tmp_path), sheet)
    assert again.by_rater == answers.by_rater
    assert again.of("Zoë / 1") == {2: Rating(preferred="b"), 5: Rating(preferred="same")}
    assert again.of("nobody") == {}
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / "answers"}
    with pytest.raises(ConfigError, match="answers to another sheet"):
        RatingStore(str(tmp_path), sheet_of(samples=6)[0])


def test_a_run_in_a_bucket_keeps_its_sheet_and_its_answers_there(s3: S3Server, tmp_path: Path) -> None:
    run_dir = f"{s3.uri}/human/r"
    lines_of = "".join(json.dumps(row) + "\n" for row in lines()).encode()
    storage.write_bytes(f"{run_dir}/evaluate/generations.jsonl", lines_of)
    sheet, key = open_sheet(run_dir, config.HumanEvalConfig(samples=5))
    RatingStore(f"{run_dir}/evaluate/human", sheet).save("ann", {1: Rating(preferred="a")})
    assert read_sheet(run_dir) == (sheet, key)
    assert RatingStore(f"{run_dir}/evaluate/human", sheet).of("ann") == {1: Rating(preferred="a")}


@pytest.mark.parametrize(
    ("rater", "number", "answer", "words"),
    [
        ("ann", 6, Rating(), "sample 6 is not on the sheet; it has samples 1 to 5"),
        ("ann", 0, Rating(), "sample 0 is not on the sheet"),
        ("ann", 1, Rating(a={"wit": 3}), "'wit' is not a criterion of the sheet; its criteria: accuracy, "),
        ("", 1, Rating(), "is not a valid name for a rater; use 1 to 40 characters"),
        (" ann", 1, Rating(), "is not a valid name"),
        ("a\nb", 1, Rating(), "is not a valid name"),
        ("x" * 41, 1, Rating(), "is not a valid name"),
    ],
)
def test_what_the_sheet_does_not_have_is_not_kept(
    tmp_path: Path, rater: str, number: int, answer: Rating, words: str
) -> None:
    answers = RatingStore(str(tmp_path), sheet_of(samples=5)[0])
    with pytest.raises(ConfigError, match=words):
        answers.save(rater, {number: answer})
    assert list(tmp_path.rglob("*")) == []


# The page's server


def ask(url: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(url, data=body, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as err:
        return err.code, err.read(), err.headers


def test_the_server_gives_sheet_and_own_answers_to_those_who_have_its_address(tmp_path: Path) -> None:
    sheet, key = sheet_of(samples=10)
    answers = RatingStore(str(tmp_path), sheet)
    answers.save("bob", {1: Rating(preferred="b")})
    with serving(build_page(sheet, answers, key.token), key.token, "127.0.0.1", 0) as address:
        root = address.removesuffix(f"{key.token}/")
        assert root.startswith("http://127.0.0.1:")
        put = ask(f"{address}answers/3?rater=ann", "PUT", b'{"preferred": "same", "a": {"style": 5}}')
        assert put[0] == 204
        assert RatingStore(str(tmp_path), sheet).of("ann") == {3: Rating(preferred="same", a={"style": 5})}, (
            "not at once"
        )
        status, body, headers = ask(f"{address}sheet?rater=ann")
        tree = json.loads(body)
        assert status == 200
        assert tree["answers"] == {"3": {"preferred": "same", "a": {"style": 5}}}
        assert [set(s) for s in tree["samples"]] == [{"question", "reference", "a", "b"}] * 10
        assert set(tree) == {"answers", "criteria", "samples"}
        page = b"".join(ask(f"{address}{name}")[1] for name in ("", "page.js", "page.css"))
        for secret in (b"bob", b"tuned", b"rare", key.token.encode()):
            assert secret not in body + page
        assert "default-src 'none'" in headers["content-security-policy"]
        for path in ("", "sheet?rater=ann", "x/sheet?rater=ann", "page.js", f"{key.token}x/"):
            assert ask(root + path)[0] == 404
        assert ask(f"{root}answers/3?rater=ann", "PUT", b"{}")[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("answers/11?rater=ann", b"{}", 400),
        ("answers/1?rater=", b"{}", 400),
        ("answers/1", b"{}", 400),
        ("answers/x?rater=ann", b"{}", 404),
        ("answers/1?rater=ann", b"{", 400),
        ("answers/1?rater=ann", b'{"preferred": "tuned"}', 400),
        ("answers/1?rater=ann", b'{"a": {"style": 6}}', 400),
        ("answers/1?rater=ann", b'{"a": {"style": true}}', 400),
        ("answers/1?rater=ann", b'{"a": {"wit": 3}}', 400),
        ("answers/1?rater=ann", b'{"more": 1}', 400),
        ("answers/1?rater=ann", b" " * (MAX_BODY_BYTES + 1), 413),
    ],
)
def test_the_server_keeps_nothing_that_is_no_answer(tmp_path: Path, path: str, body: bytes, status: int) -> None:
    sheet, _ = sheet_of(samples=10)
    with serving(build_page(sheet, RatingStore(str(tmp_path), sheet), "t"), "t", "127.0.0.1", 0) as address:
        assert ask(address + path, "PUT", body)[0] == status
    assert list(tmp_path.rglob("*.json")) == []


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    sheet, _ = sheet_of(samples=2)
    app = build_page(sheet, RatingStore(str(tmp_path), sheet), "t")
    with serving(app, "t", "127.0.0.1", 0) as address:
        port = int(address.split(":")[2].split("/")[0])
        with (
            pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port} is not available"),
            serving(app, "t", "127.0.0.1", port),
        ):
            pass


def test_the_page_writes_text_only_as_text() -> None:
    source = (Path(config.__file__).parents[1] / "evaluate/human/static/page.js").read_text()
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
        assert unsafe not in source


# CSV


def filled(data: bytes, fill: Any, delimiter: str = ",", encoding: str = "utf-8-sig") -> bytes:
    """A sheet as a person saves it: `fill(row)` changes a row."""
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        fill(row)
        writer.writerow(row)
    return out.getvalue().encode(encoding)


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8-sig"), (";", "utf-8"), ("\t", "cp1252")])
def test_what_is_written_into_the_csv_comes_back(delimiter: str, encoding: str) -> None:
    sheet, _ = sheet_of(samples=20, criteria=["accuracy", "house style"])
    rng = random.Random(0)
    said: dict[int, Rating] = {}

    def fill(row: dict[str, str]) -> None:
        number = int(row["sample"])
        row["rater"] = "Zoë" if number == 1 else ""
        if number % 5 == 0:
            return
        row["preferred"] = rng.choice(["A", "b", "Same", "tie", ""])
        preferred = {"A": "a", "b": "b", "": None}.get(row["preferred"], "same")
        scores = {c: rng.randint(1, 5) for c in ("A accuracy", "B accuracy", "B house style")}
        row.update({c: str(v) for c, v in scores.items()})
        b = {"accuracy": scores["B accuracy"], "house style": scores["B house style"]}
        said[number] = Rating(preferred=preferred, a={"accuracy": scores["A accuracy"]}, b=b)

    data = filled(to_csv(sheet), fill, delimiter, encoding)
    assert from_csv(data, sheet, "f.csv") == {"Zoë": said}
    assert len(said) == 16


def test_the_csv_is_blinded_and_no_cell_is_a_formula() -> None:
    sheet, _ = sheet_of(samples=20)
    data = to_csv(sheet)
    head, *rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    assert head[:8] == ["sheet", "sample", "question", "reference", "answer A", "answer B", "rater", "preferred"]
    assert head[8:10] == ["A accuracy", "B accuracy"]
    assert len(head) == 8 + 10
    assert [row[1] for row in rows] == [str(n) for n in range(1, 21)]
    assert all(cell == "" for row in rows for cell in row[6:])
    for row, sample in zip(rows, sheet.samples, strict=True):
        assert [cell.removeprefix("'") for cell in row[2:6]] == [*vars(sample).values()]
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row)
    assert b"slice" not in data
    assert to_csv(sheet) == data


WRONG = [
    ({"preferred": "tuned"}, "f.csv, row {n}: preferred is 'tuned'; write A, B or same"),
    ({"A style": "6"}, "f.csv, row {n}: A style is '6'; write an integer from 1 to 5"),
    ({"A style": "3.5"}, "A style is '3.5'"),
    ({"sample": "99", "preferred": "a"}, "sample '99' is not on the sheet; it has samples 1 to 3"),
    ({"sample": "1", "preferred": "a"}, "ann has answered sample 1 in an earlier row; remove one"),
    ({"sheet": "0123", "preferred": "a"}, "belongs to sheet '0123', but this run's sheet is "),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_a_wrong_cell_is_named_with_its_row(change: dict[str, str], words: str) -> None:
    sheet, _ = sheet_of(samples=3)

    def fill(row: dict[str, str]) -> None:
        row.update({"rater": "ann", "preferred": "a"} if row["sample"] == "1" else {})
        row.update(change if row["sample"] == "2" else {})

    with pytest.raises(ConfigError) as error:
        from_csv(filled(to_csv(sheet), fill), sheet, "f.csv")
    assert words.partition("{n}")[0] in str(error.value)
    assert words.partition("{n}")[2] in str(error.value)


def test_a_csv_without_names_answers_or_columns_is_refused() -> None:
    sheet, _ = sheet_of(samples=3)
    with pytest.raises(ConfigError, match="the column 'rater' is empty"):
        from_csv(filled(to_csv(sheet), lambda row: row.update(preferred="a")), sheet, "f.csv")
    with pytest.raises(ConfigError, match=r"f\.csv has no filled row"):
        from_csv(to_csv(sheet), sheet, "f.csv")
    with pytest.raises(ConfigError, match=r"f\.csv lacks the column 'A accuracy'"):
        from_csv(b"sheet,sample,rater,preferred\r\n", sheet, "f.csv")


# The verb


def test_csv_out_and_in_ends_in_results(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=20, criteria=["style"])
    said = io.StringIO()
    human(run, HumanEvalOptions(csv=str(tmp_path / "out.csv")), Console(said))
    key = json.loads((tmp_path / "r/evaluate/human/key.json").read_text())

    def fill(row: dict[str, str]) -> None:  # prefers the tuned model throughout, and scores it one better
        tuned = key["tuned"][int(row["sample"]) - 1].upper()
        row.update({"rater": "ann", "preferred": tuned, "A style": "3", "B style": "3", f"{tuned} style": "4"})

    (tmp_path / "in.csv").write_bytes(filled((tmp_path / "out.csv").read_bytes(), fill))
    human(run, HumanEvalOptions(filled=str(tmp_path / "in.csv")), Console(said))
    results = json.loads((tmp_path / "r/evaluate/human/results.json").read_text())
    assert (results["wins"], results["ties"], results["losses"]) == (20, 0, 0)
    assert results["win_rate"]["value"] == 1
    assert results["criteria"]["style"]["change"]["value"] == 1
    assert "the tuned model is preferred" in said.getvalue()
    (tmp_path / "out.csv").write_bytes(b"my work")
    with pytest.raises(ConfigError, match="already exists and may contain answers; use another name"):
        human(run, HumanEvalOptions(csv=str(tmp_path / "out.csv")), Console(said))
    assert (tmp_path / "out.csv").read_bytes() == b"my work"
    (tmp_path / "r/evaluate/human/results.json").unlink()
    human(run_of(tmp_path, samples=9), HumanEvalOptions(results=True), Console(said))  # of the sheet that is there
    assert json.loads((tmp_path / "r/evaluate/human/results.json").read_text()) == results


def test_results_without_a_sheet_and_a_second_server_are_refused(tmp_path: Path) -> None:
    from ftray.storage import acquire_lease

    run = run_of(tmp_path)
    with pytest.raises(ConfigError, match="has no sheet yet"):
        human(run, HumanEvalOptions(results=True), Console(io.StringIO()))
    with acquire_lease(str(tmp_path / "r/evaluate/human")), pytest.raises(RunHeldError):
        human(run, HumanEvalOptions(), Console(io.StringIO()))


def test_the_verb_has_two_words_and_leaves_a_run_of_that_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path)
    Path("r.yaml").write_text(f"name: r\nstorage: {tmp_path}\nmodel: {{base: m}}\ndata: {{train: [{{path: p}}]}}\n")
    assert main(["evaluate", "human", "r.yaml", "--results"]) == 2
    assert "has no sheet yet; run `ftray evaluate human` on it first" in capsys.readouterr().err
    assert main(["evaluate", "human", "r.yaml", "--csv", "a.csv", "evaluate.human.samples=7"]) == 0
    assert "wrote 7 samples" in capsys.readouterr().out
    assert main(["evaluate", "judge", "r.yaml"]) == 2
    assert "evaluate.judge is missing" in capsys.readouterr().err
    assert main(["evaluate", "./human"]) == 2
    assert "./human is neither a run file (.yaml) nor the directory of a run" in capsys.readouterr().err
    for wrong in (["--port", "70000"], ["--csv", "a", "--results"], ["--nonsense"]):
        assert main(["evaluate", "human", "r.yaml", *wrong]) == 2


# Figures


def test_wilson_is_the_interval_of_the_reference_implementation() -> None:
    for wins, number in itertools.chain(
        [(0, 1), (1, 1), (0, 40), (40, 40)], ((k, n) for n in (2, 7, 100) for k in range(n))
    ):
        found = wilson([1.0] * wins + [0.0] * (number - wins))
        expected = stats.binomtest(wins, number).proportion_ci(0.95, method="wilson")
        assert (found.value, found.num) == (wins / number, number)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson([0.5] * 10).value == 0.5
    assert wilson([0.5] * 10) == wilson([1.0, 0.0] * 5)


def test_bootstrap_is_close_to_the_reference_implementation_and_the_same_each_time() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, 80)
    found = bootstrap(values.tolist())
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=2)
    assert found.value == pytest.approx(values.mean())
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.03 * width)
    assert bootstrap(values.tolist()) == found
    assert bootstrap([1.0, 1.0, 1.0]).low == bootstrap([1.0]).high == 1.0


def slow_alpha(matrix: list[list[float]]) -> float:
    """Krippendorff's alpha for ordinal data, from its definition: observed over expected disagreement."""
    units = [[v for v in unit if not math.isnan(v)] for unit in zip(*matrix, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    everything = [v for unit in units for v in unit]
    counts = {v: everything.count(v) for v in sorted(set(everything))}

    def distance(c: float, k: float) -> float:
        low, high = min(c, k), max(c, k)
        return float((sum(n for v, n in counts.items() if low <= v <= high) - (counts[c] + counts[k]) / 2) ** 2)

    n = len(everything)
    observed = sum(distance(x, y) / (len(u) - 1) for u in units for x, y in itertools.permutations(u, 2)) / n
    expected = sum(distance(x, y) for x, y in itertools.permutations(everything, 2)) / (n * (n - 1))
    return 1 - observed / expected


def test_alpha_is_the_published_one_and_that_of_its_definition() -> None:
    x = math.nan  # Krippendorff (2011), Computing Krippendorff's alpha-reliability, section C
    published = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3],
        [x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x],
    ]
    assert alpha(published) == pytest.approx(0.815, abs=5e-4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix = rng.integers(1, 6, (3, 15)).astype(float)
        matrix[rng.random((3, 15)) < 0.3] = math.nan
        assert alpha(matrix.tolist()) == pytest.approx(slow_alpha(matrix.tolist()), abs=1e-9)
    assert alpha([[1, 2, 3], [1, 2, 3]]) == pytest.approx(1)
    for undefined in ([], [[1, 2, 3]], [[1, x], [x, 2]], [[2, 2], [2, 2]], [[x, x], [x, x]]):
        assert alpha(undefined) is None


def test_results_count_what_was_said_by_hand_made_numbers() -> None:
    sheet, key = sheet_of({"x": 2, "y": 2}, samples=4, criteria=["style"])
    tuned, base = key.tuned, ["b" if side == "a" else "a" for side in key.tuned]

    def answer(n: int, who: str, base_score: int, tuned_score: int) -> Rating:
        sides = {tuned[n - 1]: {"style": tuned_score}, base[n - 1]: {"style": base_score}}
        return Rating.model_validate({"preferred": {"t": tuned[n - 1], "b": base[n - 1], "s": "same"}[who], **sides})

    answers = {
        "ann": {1: answer(1, "t", 2, 4), 2: answer(2, "t", 3, 3), 3: answer(3, "b", 5, 1)},
        "bob": {1: answer(1, "s", 1, 2), 2: answer(2, "t", 3, 5)},
        "eve": {4: Rating(a={"style": 4})},
    }
    found = results_of(sheet, key, answers)
    assert found.raters == {"ann": 3, "bob": 2, "eve": 0}
    assert (found.wins, found.ties, found.losses, found.num_shared) == (3, 1, 1, 2)
    assert found.win_rate == wilson([0.75, 1.0, 0.0])  # of samples 1, 2 and 3
    style = found.criteria["style"]
    assert (style.base, style.tuned) == pytest.approx(((1.5 + 3 + 5) / 3, (3 + 4 + 1) / 3))
    assert style.change == bootstrap([1.5, 1.0, -4.0])
    where = {n: key.slices[n - 1] for n in (1, 2, 3)}
    means = {1: 0.75, 2: 1.0, 3: 0.0}
    for name in set(where.values()):
        assert found.slices[name] == wilson([means[n] for n in means if where[n] == name])
    assert verdict(found) == "the difference is not significant"
    assert any(line.startswith("so far: ") for line in as_text(found))
    assert as_text(results_of(sheet, key, {}))[-1] == "there are no ratings yet"


def test_agreement_is_on_what_raters_saw_so_that_a_clear_winner_is_no_disagreement() -> None:
    sheet, key = sheet_of(samples=40)
    one = {n: Rating(preferred=side) for n, side in enumerate(key.tuned, 1)}
    assert results_of(sheet, key, {"ann": one, "bob": one}).agreement == pytest.approx(1)
    other = {n: Rating(preferred="b" if a.preferred == "a" else "a") for n, a in one.items()}
    found = results_of(sheet, key, {"ann": one, "bob": other})
    assert found.agreement is not None
    assert found.agreement < -0.9
    assert found.win_rate is not None
    assert found.win_rate.value == 0.5
    assert results_of(sheet, key, {"ann": one}).agreement is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 0}, "samples"),
        ({"criteria": ["style", "Style"]}, "lists a criterion twice"),
        ({"criteria": ["=x"]}, "criteria"),
        ({"sampels": 3}, "samples"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    tree = {"name": "r", "model": {"base": "m"}, "data": {"train": [{"path": "p"}]}}
    with pytest.raises(ConfigError, match=words):
        config.parse_run({**tree, "evaluate": {"human": settings}}, "f")
