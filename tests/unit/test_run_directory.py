"""Every file of a run's directory may be damaged or missing: each has one answer, and none is a traceback or silence.

The table in docs/failures.md says the same in words.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ftray import config, storage
from ftray.cli import main
from ftray.console import Console
from ftray.driver.run_record import open_run
from ftray.errors import CheckpointError, ConfigError, FtrayError, ModelError
from ftray.report.run_report import read_report_data, render_report
from ftray.serve.smoke_test import known_answer
from ftray.train.checkpoint.catalog import (
    RunProgress,
    best_checkpoint,
    find_newest,
    merge_metrics,
    read_metrics,
    read_segments,
)
from ftray.train.checkpoint.restore import open_parent
from ftray.train.checkpoint.tensors import TensorPart
from ftray.train.checkpoint.writer import CheckpointWriter
from tests.runs import BEGAN_S, SETTINGS, line, write_evaluation, write_session

DEEP = b"[" * 100_000
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "a list": lambda _: b"[1, 2]",
    "a number": lambda _: b"7",
    "other keys": lambda _: b'{"other": 1}',
    "deeply nested": lambda _: DEEP,
    "not text": lambda _: b"\xff\xfe\x00",
}
ENVIRONMENT = {
    "python": "3.11.7",
    "cpu": "a CPU",
    "image": None,
    "code": {"commit": None, "sha256": "ab"},
    "packages": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with a checkpoint every 2, an evaluation and a sweep, as its writers leave it."""
    root = tmp_path_factory.mktemp("sound")
    data = {**SETTINGS["data"], "train": [{"path": "s3://bucket/data"}]}
    tree = {
        **SETTINGS,
        "data": data,
        "train": {"global_batch_size": 4, "max_steps": 6},
        "evaluate": {},
        "storage": str(root),
    }
    run = config.parse_run(tree, "test")
    run_dir = root / run.name
    open_run(run)
    identity = json.loads((run_dir / "run.json").read_bytes())
    identity["lineage"] = {
        "id": "0123456789abcdef",
        "config_hash": run.config_hash,
        "base": {"name": "org/base", "revision": None, "files": {}},
        "data": {"hash": "d1", "files": [{"part": "train", "source": 0, "uri": "data/a", "etag": "e", "rows": "r"}]},
        "environment": ENVIRONMENT,
    }
    (run_dir / "run.json").write_text(json.dumps(identity))
    writer = CheckpointWriter(str(run_dir), 9, {"config_hash": run.config_hash, "data_hash": "d1-d2"}, whole=True)
    progress = RunProgress()
    for step in (2, 4, 6):
        progress.step, progress.finished = step, step == 6
        lines = [line(n, 3.0 - n / 10, BEGAN_S + n) for n in (step - 2, step - 1)]
        writer.save(progress, [TensorPart("weights.a", (4,), 0, torch.ones(4))], lines)
        writer.wait()
    merge_metrics(str(run_dir), progress)
    start = {"step": 0, "num_steps": 6, "workers": 1, "device": "CPU"}
    write_session(run_dir, "1-a", [(0, "began", {"step": 0, "host": "n", "pid": 1}), (1, "start", start)])
    write_evaluation(run, run_dir)
    speeds = {"num_answers": 4, "tokens_per_s": 5.0, "latency_p50_s": 0.1, "latency_p95_s": 0.2}
    (run_dir / "evaluate/speed.json").write_text(json.dumps({"base": speeds, "tuned": speeds}))
    (run_dir / "evaluate/endpoint.json").write_text(json.dumps({"step": 6, "answer": "moo"}))
    report = {"at": 0, "step": 6, "share": 1.0, "loss": 2.0, "stop": False}
    trial = {
        "number": 0,
        "params": {"train.seed": 1},
        "status": "done",
        "num_steps": 6,
        "reports": [report],
        "error": "",
    }
    (run_dir / "tune").mkdir()
    (run_dir / "tune/state.json").write_text(
        json.dumps({"version": 1, "settings": {}, "trials": [trial], "data_hash": ""})
    )
    (run_dir / "tune/results.json").write_text(json.dumps({"importance": None, "best": {"command": "ftray train"}}))
    (run_dir / "data").mkdir()
    (run_dir / "data/index-1.json").write_text("{}")
    (run_dir / "data/summary.json").write_text("{}")
    (run_dir / "data/reference.json").write_text("{}")
    with storage.acquire_lease(str(run_dir)):
        pass
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged, with its own address in its settings."""
    root = tmp_path / "runs"
    shutil.copytree(sound, root)
    for file in (root / "run.yaml", root / "seen/run.json"):
        file.write_text(file.read_text().replace(str(sound), str(root)))
    return root


def damage(file: Path, how: str) -> None:
    data = DAMAGE[how](file.read_bytes())
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    os.utime(file.parent)


def run_of(root: Path) -> config.RunConfig:
    return config.load_run(str(root / "run.yaml"), [])


class Reader:
    """The verbs that read a run's directory, each ended with a code; what was printed, and that it was no traceback."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys, self.text = root, capsys, ""

    def __call__(self, *words: str) -> int:
        self._capsys.readouterr()
        code = main.main(list(words))
        printed = self._capsys.readouterr()
        self.text = printed.out + printed.err
        assert "Traceback" not in self.text, self.text
        assert "Error:" not in self.text, self.text
        return code

    def all(self) -> dict[str, int]:
        """Code by verb."""
        run_dir, run_file = str(self.root / "seen"), str(self.root / "run.yaml")
        verbs = {
            "report": ("report", run_file),
            "report of a directory": ("report", run_dir),
            "compare": ("runs", "compare", run_dir, run_file),
            "gc": ("runs", "gc", str(self.root), "--dry-run", "--older-than", "0"),
        }
        return {name: self(*words) for name, words in verbs.items()}


@pytest.fixture
def ftray(root: Path, capsys: pytest.CaptureFixture[str]) -> Reader:
    return Reader(root, capsys)


FINE = {"report": 0, "report of a directory": 0, "compare": 0, "gc": 0}


def test_a_sound_run_is_read_without_a_word_of_damage(ftray: Reader) -> None:
    assert ftray.all() == FINE
    known = read_report_data(run_of(ftray.root), str(ftray.root / "seen"))
    assert known.damaged == ()
    assert "Damaged files" not in render_report(known)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_metrics_segment_is_mended_from_the_merged_file(root: Path, ftray: Reader, how: str) -> None:
    run_dir = root / "seen"
    file = run_dir / "metrics/00000002-00000003.jsonl"
    before = read_metrics(str(run_dir))
    damage(file, how)
    warnings: list[str] = []
    assert read_metrics(str(run_dir), warn=warnings.append) == before
    assert len(warnings) == 1
    assert str(file) in warnings[0]
    assert ftray.all() == FINE
    newest = find_newest(str(run_dir), pytest.fail)
    assert newest is not None, "the checkpoint is sound"
    assert merge_metrics(str(run_dir), newest.progress) == 6


@pytest.mark.parametrize("how", DAMAGE)
def test_without_the_merged_file_a_damaged_segment_costs_its_own_steps(root: Path, ftray: Reader, how: str) -> None:
    run_dir = root / "seen"
    file = run_dir / "metrics/00000002-00000003.jsonl"
    damage(file, how)
    damage(run_dir / "metrics.jsonl", how)
    warnings: list[str] = []
    assert [each["step"] for each in read_metrics(str(run_dir), warn=warnings.append)] == [0, 1, 4, 5]
    assert f"{file} is damaged" in warnings[0]
    assert "metrics of steps 2 to 3 are left out" in warnings[0]
    assert ftray.all() == FINE
    newest = find_newest(str(run_dir), pytest.fail)
    assert newest is not None
    assert newest.step == 6
    assert merge_metrics(str(run_dir), newest.progress, warnings.append) == 4, "training ends without a traceback"
    assert [len(lines) for lines in read_segments(str(run_dir), {})] == [2, 2]
    known = read_report_data(run_of(root), str(run_dir))
    assert any(str(file) in text for text in known.damaged)
    assert "Damaged files" in render_report(known)


def test_a_number_that_changed_in_a_segment_is_noticed(root: Path) -> None:
    run_dir = root / "seen"
    file = run_dir / "metrics/00000002-00000003.jsonl"
    file.write_text(file.read_text().replace('"loss": 2.8', '"loss": 9.8'))
    warnings: list[str] = []
    assert [each["loss"] for each in read_metrics(str(run_dir), warn=warnings.append)][2] == 2.8
    assert "its checksum differs" in warnings[0]


@pytest.mark.parametrize("how", [how for how in DAMAGE if how != "missing"])
def test_a_damaged_run_json_is_refused_by_name_and_the_sweep_goes_on(root: Path, ftray: Reader, how: str) -> None:
    file = root / "seen/run.json"
    damage(file, how)
    codes = ftray.all()
    assert codes == {"report": 2, "report of a directory": 2, "compare": 2, "gc": 0}
    for words in (("report", str(root / "seen")), ("export", str(root / "seen")), ("evaluate", str(root / "seen"))):
        assert ftray(*words) == 2
        assert f"{file} is damaged (" in ftray.text
    before = file.read_bytes()
    with pytest.raises(FtrayError, match="is damaged"):
        open_run(run_of(root))
    assert file.read_bytes() == before, "nothing is written over what somebody may mend"


def test_a_run_json_that_was_lost_is_written_anew_from_the_same_run_file_only(root: Path, ftray: Reader) -> None:
    file = root / "seen/run.json"
    hash_before = json.loads(file.read_bytes())["config_hash"]
    file.unlink()
    other = config.load_run(str(root / "run.yaml"), ["train.seed=9"])
    with pytest.raises(ConfigError, match=r"run\.json is missing"):
        open_run(other)
    assert not file.exists()
    assert ftray("report", str(root / "seen")) == 2
    open_run(run_of(root))
    assert json.loads(file.read_bytes())["config_hash"] == hash_before
    assert ftray.all() == FINE


@pytest.mark.parametrize("lineage", [5, [], {"id": 1}, {"id": "a", "environment": []}])
def test_a_damaged_lineage_is_left_out_of_pages_and_refused_where_it_counts(
    root: Path, ftray: Reader, lineage: Any
) -> None:
    file = root / "seen/run.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "lineage": lineage}))
    assert ftray.all() == FINE
    assert ftray("report", str(root / "seen")) == 0
    assert "is damaged (lineage" in ftray.text
    assert ftray("reproduce", str(root / "seen")) == 2
    assert "is damaged (lineage" in ftray.text


LATEST = "seen/checkpoints/step-000006"


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_manifest_is_named_and_nothing_older_is_taken_silently(
    root: Path, ftray: Reader, how: str
) -> None:
    run_dir, manifest = root / "seen", root / LATEST / "manifest.json"
    damage(manifest, how)
    assert ftray.all() == FINE
    assert str(manifest) in ftray_damage(root)
    for words in (("export", str(run_dir)), ("evaluate", str(run_dir)), ("export", str(run_dir), "--step", "6")):
        assert ftray(*words) == 1
        assert str(manifest) in ftray.text
    assert ftray("train", str(root / "run.yaml"), "--from", str(run_dir), "name=child") == 2
    assert str(manifest) in ftray.text
    assert ftray("publish", str(run_dir)) == 1
    assert best_checkpoint(str(run_dir), step=4).step == 4, "an older one is taken when it is named"
    assert open_parent(str(run_dir / "checkpoints/step-000004")).step == 4
    warnings: list[str] = []
    newest = find_newest(str(run_dir), warnings.append)
    assert newest is not None
    assert newest.step == 4, "training goes on from the one before it"
    assert str(manifest) in warnings[0]


def ftray_damage(root: Path) -> str:
    return "\n".join(read_report_data(run_of(root), str(root / "seen")).damaged)


@pytest.mark.parametrize("how", DAMAGE)
def test_where_all_manifests_are_damaged_nobody_is_told_to_train_first(root: Path, ftray: Reader, how: str) -> None:
    run_dir = root / "seen"
    for step in (2, 4, 6):
        damage(run_dir / f"checkpoints/step-{step:06d}/manifest.json", how)
    assert ftray.all() == FINE
    for verb in ("export", "evaluate"):
        assert ftray(verb, str(run_dir)) == 1
        assert f"{LATEST}/manifest.json" in ftray.text
        assert "train first" not in ftray.text
    with pytest.raises(CheckpointError, match=r"are damaged; restore one"):
        find_newest(str(run_dir), lambda _: None)
    before = (run_dir / "run.json").read_bytes()
    with pytest.raises(ConfigError, match="started with other settings"):
        open_run(config.load_run(str(root / "run.yaml"), ["train.seed=9"]))
    assert (run_dir / "run.json").read_bytes() == before
    assert len(list((run_dir / "metrics").iterdir())) == 3


def test_without_any_checkpoint_the_words_are_to_train(root: Path, ftray: Reader) -> None:
    shutil.rmtree(root / "seen/checkpoints")
    assert ftray("export", str(root / "seen")) == 2
    assert "has no checkpoint; train first" in ftray.text
    assert ftray("export", str(root / "seen"), "--step", "4") == 2


def test_a_writer_that_was_killed_before_its_manifest_is_no_damage(root: Path) -> None:
    left = root / "seen/checkpoints/step-000008"
    left.mkdir()
    (left / "state.safetensors").write_bytes(bytes(100))
    (left / "state.json").write_text("{}")
    assert best_checkpoint(str(root / "seen")).step == 6
    assert find_newest(str(root / "seen"), pytest.fail) is not None


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_state_is_refused_by_name_and_training_goes_on_before_it(root: Path, how: str, name: str) -> None:
    from ftray.train.checkpoint.writer import load_checkpoint

    damage(root / LATEST / name, how)
    found = best_checkpoint(str(root / "seen"))
    with pytest.raises(CheckpointError, match=rf"{name} .*--step"):
        load_checkpoint(found)
    warnings: list[str] = []
    newest = find_newest(str(root / "seen"), warnings.append)
    assert newest is not None
    assert newest.step == 4
    assert name in warnings[0]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_mark_of_a_checkpoint_is_of_no_account(root: Path, ftray: Reader, how: str) -> None:
    damage(root / LATEST / storage.MARK, how)
    assert ftray.all() == FINE
    assert best_checkpoint(str(root / "seen")).step == 6


@pytest.mark.parametrize("how", [*DAMAGE, "keys of another type"])
def test_a_damaged_lease_holds_a_run_for_a_minute_and_no_other(root: Path, ftray: Reader, how: str) -> None:
    shutil.copytree(root / "seen", root / "other")
    file = root / "seen/lease/000001.json"
    if how == "keys of another type":
        file.write_text(json.dumps({**json.loads(file.read_bytes()), "released": False, "since": 5, "pid": "x"}))
    else:
        damage(file, how)
    assert ftray.all() == FINE
    if how == "missing":
        return
    assert ftray("runs", "gc", str(root), "--older-than", "0") == 0
    assert f"skipped: run 'seen' may be in use: its lease file {file} is damaged (" in ftray.text
    assert len(list((root / "other/lease").iterdir())) == 3, "the other run was swept"
    os.utime(file, (BEGAN_S - 1e8, BEGAN_S - 1e8))
    with storage.acquire_lease(str(root / "seen")):
        pass


PAGES = (
    *("metrics.jsonl", "events/1-a.jsonl", "evaluate/results.json", "evaluate/speed.json"),
    *("evaluate/generations.jsonl", "evaluate/endpoint.json", "tune/state.json", "tune/results.json"),
    *("data/index-1.json", "data/summary.json", "data/reference.json"),
)
EACH = [((name,), how) for name in PAGES for how in ("truncated", "other keys", "deeply nested")]


@pytest.mark.parametrize(("names", "how"), [*EACH, *((PAGES, how) for how in DAMAGE)])
def test_what_pages_are_made_of_may_be_damaged(root: Path, ftray: Reader, names: tuple[str, ...], how: str) -> None:
    for name in names:
        damage(root / "seen" / name, how)
    assert ftray.all() == FINE
    read_report_data(run_of(root), str(root / "seen"))
    known_answer(str(root / "seen"), 6)


@pytest.mark.parametrize("how", [how for how in DAMAGE if how not in ("empty", "missing")])
@pytest.mark.parametrize("name", ["evaluate/generations.jsonl", "evaluate/speed.json"])
def test_a_damaged_evaluation_is_not_shown_but_made_anew(root: Path, name: str, how: str) -> None:
    from ftray.evaluate.results import read_results
    from ftray.evaluate.run import UNREADABLE, _render

    run, run_dir = run_of(root), str(root / "seen")
    known = read_results(run_dir)
    assert known is not None
    assert _render(run, run_dir, known)[1].startswith("question 0")
    damage(root / "seen" / name, how)
    with pytest.raises(UNREADABLE):
        _render(run, run_dir, known)


@pytest.mark.parametrize("how", [how for how in DAMAGE if how != "missing"])
@pytest.mark.parametrize("name", ["events/1-a.jsonl", "evaluate/results.json", "tune/state.json"])
def test_what_is_left_out_of_a_report_is_named(root: Path, ftray: Reader, name: str, how: str) -> None:
    if (name, how) == ("events/1-a.jsonl", "empty"):
        pytest.skip("a driver that was killed at once leaves no line")
    file = root / "seen" / name
    damage(file, how)
    assert ftray("report", str(root / "seen")) == 0
    assert re.search(rf"warning: (cannot read )?{re.escape(str(file))}", ftray.text)


@pytest.mark.parametrize("how", [how for how in DAMAGE if how != "missing"])
def test_a_run_whose_gates_can_not_be_read_is_not_published(root: Path, how: str) -> None:
    from ftray.cli.publish import _check_gates

    damage(root / "seen/evaluate/results.json", how)
    if how == "other keys":
        return  # no gates were asked for
    with pytest.raises(FtrayError, match=r"results\.json is damaged"):
        _check_gates(str(root / "seen"), 6, "run.yaml")


def test_a_number_that_changed_in_an_index_is_noticed(tmp_path: Path) -> None:
    from ftray.data import index as indexes
    from ftray.data.examples import Quarantined

    uri = str(tmp_path / "index-1.json")
    made = indexes.Index(
        (), (Quarantined("data/a", 7, "too_long", "4100 tokens", "…"),), found={"near": (3, 1)}, shards=("s",)
    )
    indexes._write(uri, made)
    assert indexes._read(uri) == made
    text = Path(uri).read_text()
    Path(uri).write_text(text.replace('"near": [3', '"near": [4'))
    assert Path(uri).read_text() != text
    assert indexes._read(uri) is None, "it is made anew"


def test_who_serves_an_older_step_than_the_best_is_told_so(root: Path) -> None:
    from ftray.cli.serve import say_step

    run, model, stream = run_of(root), root / "seen/model", io.StringIO()
    say_step(run, "run.yaml", Console(stream))
    model.mkdir()
    (model / "config.json").write_text("{}")
    storage.commit_directory(str(model), str(model), {"step": 4})
    say_step(run, "run.yaml", Console(stream))
    assert stream.getvalue() == (
        "warning: the served model is from step 4, but the run's best checkpoint is step 6; to serve that one: "
        "ftray export run.yaml\n"
    )
    damage(root / LATEST / "manifest.json", "zeros")
    say_step(run, "run.yaml", Console(stream))
    assert "is from step 4; the newest checkpoint is damaged" in stream.getvalue()
    damage(model / "manifest.json", "truncated")
    with pytest.raises(ModelError, match=r"export the model again: ftray export run\.yaml"):
        say_step(run, "run.yaml", Console(stream))


def test_progress_of_a_manifest_is_checked_even_where_its_sum_is_right(root: Path) -> None:
    progress = asdict(RunProgress(step=8))
    for wrong in ({}, {**progress, "segments": ["../../x"]}, {**progress, "new": 1}, {**progress, "best": 3}):
        place = root / "seen/checkpoints/step-000008"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "state.json").write_text("{}")
        storage.commit_directory(str(place), str(place), {"progress": wrong})
        with pytest.raises(CheckpointError, match=r"step-000008/manifest\.json is damaged"):
            best_checkpoint(str(root / "seen"))
