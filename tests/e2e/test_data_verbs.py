"""`ftray data …`: what a run's data is, before it runs, and the very rows that it will train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.e2e.command import Place, assert_refused


@pytest.fixture(scope="module")
def place(place: Place) -> Place:
    tiny.write_tiny_model(place.directory / "model")
    tiny.write_records(place.directory / "data", 60)
    place.write(train__max_steps=None, train__epochs=2)
    return place


def test_index_tells_the_steps_of_an_epoch_and_what_becomes_of_the_tail(place: Place) -> None:
    ended = place.ftray("data", "index", "run.yaml", "train.global_batch_size=8")
    assert ended.code == 0
    assert "60 examples verified" in ended.line("data.train: 60 records")
    assert "steps of 8" in ended.line("an epoch: ")
    assert "epochs" in ended.line("the run: ")
    assert (place.directory / "runs/tiny/data").is_dir()
    assert not (place.directory / "runs/tiny/run.json").exists(), "looking at data binds a name to no settings"
    assert place.left_over() == []


@pytest.mark.long
def test_order_prints_only_lines_of_json_and_the_same_after_a_stop(place: Place) -> None:
    whole = place.ftray("data", "order", "run.yaml", "--workers", "4", "--steps", "0:9", "--json")
    assert whole.code == 0
    entries = [json.loads(line) for line in whole.out.splitlines()]
    assert [(e["step"], e["rank"]) for e in entries] == [(s, r) for s in range(9) for r in range(4)]
    assert {path for e in entries for path, _ in e["records"]} <= {"part-000.jsonl", "part-001.jsonl"}
    after = place.ftray("data", "order", "run.yaml", "--workers", "2", "--steps", "7:9", "--after-step", "6", "--json")
    rest = [json.loads(line) for line in after.out.splitlines()]

    def rows(found: list[dict[str, object]], step: int) -> list[object]:
        return [row for e in found if e["step"] == step for row in e["sequences"]]  # type: ignore[attr-defined]

    assert [rows(rest, step) for step in (7, 8)] == [rows(entries, step) for step in (7, 8)]
    assert all(len(rows(rest, step)) == 4 for step in (7, 8))


def test_preview_needs_no_ray(place: Place) -> None:
    ended = place.ftray("data", "preview", "run.yaml", "--number", "2")
    assert ended.code == 0
    assert ended.out.count("{+") == 1 + 2
    assert "Ray" not in ended.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workers", "3"), "--workers 3 does not divide train.global_batch_size (4)"),
        (("--steps", "3:5", "--after-step", "5"), "--after-step 5 is not below the last step of --steps 3:5"),
    ],
)
def test_a_wrong_question_is_one_sentence(place: Place, arguments: tuple[str, ...], words: str) -> None:
    assert_refused(place.ftray("data", "order", "run.yaml", *arguments), words)


def test_a_shard_that_holds_no_record_is_refused_before_ray(place: Place, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert_refused(
        place.ftray("data", "preview", "run.yaml", f"data.train.0.path={tmp_path}"), "contains notes.txt, but no"
    )
