"""`ftray init`: from a data file to a run file that fits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray import config
from ftray.cli.main import main
from ftray.data.profile import profile_source
from ftray.errors import ConfigError, DataError
from ftray.report.propose import EMBEDDED, Hardware, choose_base, propose
from tests import tiny

TOPICS = {"billing": "charged twice", "login": "cannot sign in", "shipping": "package is late"}


def tickets(number: int = 60) -> list[dict[str, Any]]:
    names = list(TOPICS)
    return [
        {"id": i, "ticket": f"Order {i}: {TOPICS[names[i % 3]]}, please help", "category": names[i % 3]}
        for i in range(number)
    ]


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
DATA: dict[str, list[dict[str, Any]]] = {
    "classify": tickets(),
    "chat": [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"answer {i * 7919}"}]}
        for i in range(40)
    ],
    "summarize": [
        {"article": f"{i} " + "long text of an article " * 40, "summary": f"In short: {i}. " * 5} for i in range(40)
    ],
    "extract": [{"prompt": f"Name {i}, age {i}", "completion": json.dumps({"age": i})} for i in range(40)],
    "tools": [
        {
            "messages": [
                {"role": "user", "content": f"Weather in Oslo, {i}?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ],
            "tools": [TOOL],
        }
        for i in range(40)
    ],
    "pretrain": [{"text": f"Chapter {i}. " + "Once upon a time. " * 20} for i in range(40)],
}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("task", DATA)
def test_the_task_is_what_the_records_look_like_and_its_run_file_passes_check(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_tiny_model(tmp_path / "model")
    write(tmp_path / "My data.jsonl", DATA[task])
    base = "nowhere/with-a-template-for-tools" if task == "tools" else "model"
    assert main(["init", "My data.jsonl", "--base", base]) == 0
    said = capsys.readouterr().out
    assert "ftray run my-data.yaml" in said
    run = config.load_run("my-data.yaml")
    assert run.name == "my-data"
    assert run.data.train[0].path == "My data.jsonl"
    only_file = ["--fast"] if task == "tools" else []  # that base is nowhere
    assert main(["check", *only_file, "my-data.yaml"]) == 0
    metrics = {"classify": "classes", "extract": "json", "chat": "rouge", "summarize": "rouge"}
    assert metrics.get(task, "loss") in run.evaluate.metrics
    assert profile_source("My data.jsonl").task == task


def test_labels_columns_and_the_split_by_class_are_found(tmp_path: Path) -> None:
    profile = profile_source(write(tmp_path / "tickets.jsonl", tickets()))
    assert profile.labels == ("billing", "login", "shipping")
    assert profile.columns == {"user": "ticket", "assistant": "category"}
    assert (profile.num_records, profile.is_exact, profile.num_files) == (60, True, 1)
    text = propose(profile, "t", EMBEDDED, Hardware(0, 0.0), [40] * 60, [2] * 60, False).text
    tree = yaml.safe_load(text)
    assert tree["data"]["eval"] == {"fraction": 0.5, "stratify": "category"}  # 30 of 60: fewer say little
    assert tree["train"]["precision"] == "fp32"
    assert config.parse_run(tree, "t").accumulation_steps >= 1


def test_sequences_hold_every_sampled_record_and_steps_follow_from_the_size_of_the_data(tmp_path: Path) -> None:
    profile = profile_source(write(tmp_path / "chat.jsonl", DATA["chat"]))
    few = yaml.safe_load(propose(profile, "t", "b", Hardware(8, 139.0), [300] * 39 + [1500], [9] * 40, False).text)
    assert few["data"]["max_seq_len"] == 2048
    assert few["train"]["global_batch_size"] == 8  # not below the number of workers
    assert few["scale"]["num_workers"] == 8
    assert few["train"]["precision"] == "bf16"
    large = profile_source(write(tmp_path / "large.jsonl", DATA["chat"] * 100))
    assert large.num_records == pytest.approx(4000, rel=0.02)  # estimated from the first 2,000
    assert not large.is_exact
    many = yaml.safe_load(propose(large, "t", "b", Hardware(8, 139.0), [1000] * 40, [9] * 40, False).text)
    assert many["data"]["max_seq_len"] == 4096  # room for four records
    sequences = 3600 * 1000 / 4096 / 0.97
    assert many["train"]["epochs"] == 3
    assert many["train"]["global_batch_size"] == 16  # the largest with at least 100 steps
    assert 100 <= 3 * sequences / 16 < 200


def test_a_base_fits_the_smallest_gpu() -> None:
    assert choose_base(Hardware(0, 0.0)) == EMBEDDED
    assert choose_base(Hardware(1, 15.0)) == "Qwen/Qwen2.5-1.5B-Instruct"
    assert choose_base(Hardware(4, 22.0)) == "Qwen/Qwen3-4B-Instruct-2507"
    assert choose_base(Hardware(8, 79.0)) == "Qwen/Qwen2.5-7B-Instruct"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.jsonl"], "missing.jsonl does not exist; correct the path"),
        (["empty.jsonl"], "empty.jsonl: the file is empty"),
        (["tickets.jsonl", "--task", "sort"], "--task sort: there is no such task; use one of chat, classify"),
        (["tickets.jsonl", "--task", "pretrain"], "tickets.jsonl holds conversations; use --task chat"),
        (["tickets.jsonl", "--task", "extract"], "some answers in tickets.jsonl are not JSON objects"),
        (["chat.jsonl", "--task", "classify"], "the 40 different answers in 40 records of chat.jsonl are no classes"),
        (["odd.jsonl"], "odd.jsonl, line 1: its keys (a, b) match no known format"),
        (["bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["images.jsonl"], "images.jsonl, line 1: it has the key images"),
        (["tickets.jsonl", "--out", "there.yaml"], "there.yaml exists; delete it, or choose another file with --out"),
        (["tickets.jsonl", "--out", "no/run.yaml"], "there is no directory no; create it"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "there.yaml").touch()
    write(tmp_path / "tickets.jsonl", tickets())
    write(tmp_path / "chat.jsonl", DATA["chat"])
    write(tmp_path / "odd.jsonl", [{"a": "x", "b": "y"}])
    write(tmp_path / "images.jsonl", [{**DATA["chat"][0], "images": ["x.png"]}])
    (tmp_path / "bad.jsonl").write_text(json.dumps(DATA["chat"][0]) + "\n{\n")
    assert main(["init", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_without_the_bases_tokenizer_lengths_are_estimated_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tickets.jsonl", tickets())
    assert main(["init", "tickets.jsonl", "--base", "nowhere/model"]) == 0
    said = capsys.readouterr()
    assert "lengths are estimated from characters" in said.out + said.err
    assert "(estimated from characters)" in said.out


def test_a_key_that_changes_nothing_in_the_conversation_is_ignored_by_name_but_ratings_are_not(tmp_path: Path) -> None:
    rated = [{**record, "score": 3} for record in DATA["chat"]]
    assert profile_source(write(tmp_path / "rated.jsonl", rated)).ignore == ("score",)
    with pytest.raises(DataError, match="label"):
        profile_source(write(tmp_path / "kto.jsonl", [{**record, "label": False} for record in DATA["chat"]]))
    with pytest.raises(ConfigError, match="--task chat"):
        profile_source(write(tmp_path / "text.jsonl", DATA["chat"]), "pretrain")
