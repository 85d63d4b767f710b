"""`ftray check` finds, without Ray, what would end a run later: in its data, its base and its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray.cli.main import main
from tests import tiny


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, data and a run file."""
    root = tmp_path_factory.mktemp("desk")
    tiny.write_tiny_model(root / "model")
    write(root / "data/train.jsonl", [chat(f"question {i}", f"answer {i}") for i in range(40)])
    write(root / "data/more.jsonl", [chat(f"another {i}", f"answer {i}") for i in range(40)])
    write(root / "eval.jsonl", [chat(f"eval {i}", f"answer {i}") for i in range(40)])
    write(root / "long-eval.jsonl", [chat(f"eval {i} " + "word " * 40, f"answer {i}") for i in range(40)])
    write(root / "copies.jsonl", [chat("the same", "answer")] * 30 + [chat(f"q {i}", "answer") for i in range(10)])
    write(root / "table.jsonl", [{"q": f"question {i}", "a": f"answer {i}"} for i in range(20)])
    write(root / "long.jsonl", [chat("word " * 500, "answer")])
    write(root / "some-long.jsonl", [*[chat(f"q {i}", "a") for i in range(9)], chat("word " * 500, "answer")])
    write(root / "no-answer.jsonl", [chat("question", "")])
    (root / "bad.jsonl").write_text(json.dumps(chat("q", "a")) + "\n{broken\n")
    (root / "empty.jsonl").touch()
    (root / "notes.txt").write_text("no records")
    tree = {
        "name": "r",
        "model": {"base": "model"},
        "data": {"max_seq_len": 256, "train": [{"path": "data"}], "eval": [{"path": "eval.jsonl"}]},
        "train": {"precision": "fp32"},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    return root


def test_a_sound_run_is_told_what_its_records_are_like(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    assert main(["check", "run.yaml"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "sample     data: 80 records of 2 files" in said.out
    assert "sample     eval.jsonl: 40 records of 1 file" in said.out
    assert main(["check", "--fast", "run.yaml", "data.train=[{path: missing.jsonl}]"]) == 0
    assert "sample" not in capsys.readouterr().out


MISTAKES = {
    "missing file": (
        "data.train=[{path: missing.jsonl}]",
        "missing.jsonl does not exist; correct data.train or data.eval",
    ),
    "missing directory": ("data.train=[{path: nowhere}]", "nowhere: no such file or directory, or nothing in it"),
    "missing eval file": ("data.eval=[{path: missing.jsonl}]", "missing.jsonl does not exist"),
    "empty file": ("data.train=[{path: empty.jsonl}]", "empty.jsonl: the file is empty; add records"),
    "no data file": ("data.train=[{path: '*.txt'}]", "notes.txt, but no .jsonl"),
    "no format": ("data.train=[{path: table.jsonl}]", "table.jsonl, line 1: its keys (a, q) match no known format"),
    "wrong column": ("data.train=[{path: table.jsonl, columns: {user: q, assistant: b}}]", "line 1: b is missing"),
    "misspelled optional column": (
        "data.train=[{path: table.jsonl, columns: {user: '{q}[ ({contxt})]', assistant: a}}]",
        "table.jsonl: no record has the column 'contxt', which its columns name; the records have a, q",
    ),
    "misspelled tools": (
        "data.train=[{path: table.jsonl, columns: {user: q, assistant: a, tools: tols}}]",
        "no record has the column 'tols'",
    ),
    "broken line": ("data.train=[{path: bad.jsonl}]", "bad.jsonl, line 2: not JSON"),
    "too long": ("data.train=[{path: long.jsonl}]", "data.max_seq_len"),
    "no answer": ("data.train=[{path: no-answer.jsonl}]", "no-answer.jsonl, line 1"),
    "unknown label": ("data.labels=[good, poor]", "data/more.jsonl, line 1"),
    "misspelled embedded base": ("model.base=embedded:smol", "embedded:smol is not an embedded model"),
    "missing base": ("model.base=modell", "model.base modell is not a local directory"),
    "base without a model": ("model.base=data", "model.base data"),
    "no such layer": ("method.target_modules=[q_prj]", "q_prj"),
    "no pairs file": ("evaluate.pairs=missing.jsonl", "missing.jsonl"),
    "no schema file": ("evaluate={metrics: [json], json_schema: none.json}", "none.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_before_ray_starts(
    mistake: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    override, words = MISTAKES[mistake]
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["check", "run.yaml", override]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


WARNINGS = {
    "copies": ("data.train=[{path: copies.jsonl}]", "29 of 40 sampled records are copies of others"),
    "leak": ("data.eval=[{path: data/train.jsonl}]", "40 of 40 sampled eval records are in the training data, too"),
    "other length": (
        "data.eval=[{path: long-eval.jsonl}]",
        "check that data.eval has the same kind of records as data.train",
    ),
}


@pytest.mark.parametrize("warning", WARNINGS)
def test_suspicious_data_is_a_warning(
    warning: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    override, words = WARNINGS[warning]
    monkeypatch.chdir(desk)
    assert main(["check", "run.yaml", override]) == 0
    said = capsys.readouterr()
    assert words in said.out + said.err


def test_bad_records_within_the_limit_are_no_error(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    assert main(["check", "run.yaml", "data.train=[{path: bad.jsonl}]", "data.max_bad_records=1"]) == 0
    assert "1 record of 1 file" in capsys.readouterr().out


def test_records_that_data_too_long_quarantines_are_no_error(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    settings = ["check", "run.yaml", "data.train=[{path: some-long.jsonl}]"]
    assert main([*settings, "data.too_long=quarantine"]) == 0
    assert "9 records of 1 file" in capsys.readouterr().out
    assert main(settings) == 2
