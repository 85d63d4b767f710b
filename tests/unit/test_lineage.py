"""What a run came from: its id, what of it changed since, the card of its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from ftray import config, storage
from ftray.console import Console
from ftray.data.index import ChunkFacts, Index
from ftray.data.prepare import PreparedData
from ftray.data.sources import Chunk, list_shards
from ftray.driver.lineage import (
    WHOLE_BYTES,
    base_files,
    environment,
    environment_changes,
    id_of,
    read_lineage,
    record_lineage,
    what_changed,
)
from ftray.errors import ConfigError, DataError, RunError
from ftray.report.model_card import described
from ftray.report.reproduce import check_before, check_data, compare_reproduction, renamed
from ftray.train.checkpoint.catalog import list_checkpoints
from tests.runs import BEGAN_S, line, with_two_kills, write_run, write_session


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "notes.md"):
        (directory / name).write_text(json.dumps({"is": name}))
    return directory


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (directory / name).write_text('{"text": "x"}\n')
    return directory


def data_of(shards: Path, digests: str = "xy") -> PreparedData:
    """As an index pass would describe these shards: a chunk each, its rows known by a letter."""
    found = list_shards(str(shards))
    facts = tuple(
        ChunkFacts(Chunk(0, s.uri, s.path, s.etag, 0, s.size_bytes), 1, 1, 5, 5, digest)
        for s, digest in zip(found, digests, strict=True)
    )
    return PreparedData(None, Index(facts, ()), None, None, f"hash-{digests}")  # type: ignore[arg-type]


def begun(tmp_path: Path, base: Path, shards: Path, parent: str | None = None) -> tuple[config.RunConfig, str]:
    sections = {"model": {"base": str(base)}, "data": {"train": [{"path": str(shards)}]}, "evaluate": {}}
    run, run_dir = write_run(tmp_path, [line(n, 2.0, BEGAN_S + n) for n in range(4)], **sections)
    (run_dir / "checkpoints").rename(run_dir / "later")
    record_lineage(run, str(run_dir), data_of(shards), "tok", "tem", parent)
    (run_dir / "later").rename(run_dir / "checkpoints")
    return run, str(run_dir)


def test_run_json_names_all_that_a_result_depends_on(tmp_path: Path, base: Path, shards: Path) -> None:
    run, run_dir = begun(tmp_path, base, shards, parent="s3://b/parent/checkpoints/step-000010")
    found = read_lineage(run_dir)
    assert found is not None
    assert found["config_hash"] == run.config_hash
    assert found["parent"] == "s3://b/parent/checkpoints/step-000010"
    assert (found["seed"], found["tokenizer_hash"], found["template_hash"]) == (0, "tok", "tem")
    assert [(f["uri"], f["part"]) for f in found["data"]["files"]] == [
        (str(shards / n), "train") for n in ("a.jsonl", "b.jsonl")
    ]
    assert all(f["etag"] and len(f["rows"]) == 16 for f in found["data"]["files"])
    assert found["base"]["files"].keys() == {"config.json", "tokenizer.json", "model.safetensors"}
    assert {"torch", "numpy", "pytest", "ftray"} <= found["environment"]["packages"].keys()
    assert len(found["environment"]["code"]["sha256"]) == 16
    assert json.loads(Path(run_dir, "run.json").read_text())["config_hash"] == run.config_hash, "the rest stands"


def test_an_id_stands_for_what_decides_and_nothing_else(tmp_path: Path, base: Path, shards: Path) -> None:
    _, run_dir = begun(tmp_path, base, shards)
    found = read_lineage(run_dir)
    assert found is not None
    plain = {key: value for key, value in found.items() if key != "id"}
    assert id_of(plain) == found["id"]
    other = json.loads(json.dumps(plain))
    other["environment"]["packages"]["pytest"] = "0"
    other["environment"]["image"] = "ftray:x"
    assert id_of(other) == found["id"]
    for change in ({"seed": 1}, {"data": {**plain["data"], "hash": "z"}}, {"template_hash": "z"}, {"parent": "p"}):
        assert id_of({**plain, **change}) != found["id"]


def test_a_run_that_goes_on_keeps_its_id_and_tells_what_changed(
    tmp_path: Path, base: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, run_dir = begun(tmp_path, base, shards)
    before = read_lineage(run_dir)
    assert before is not None
    now = json.loads(json.dumps(environment()))
    now["packages"]["torch"] = "9.9"
    monkeypatch.setattr("ftray.driver.lineage.environment", lambda: now)
    for _ in range(2):
        assert record_lineage(run, run_dir, data_of(shards), "other", "other", None) == before["id"]
    found = read_lineage(run_dir)
    assert found is not None
    (since,) = found.pop("continued")
    assert found == before
    assert since == {"step": 4, "changes": [f"torch is 9.9 instead of {environment()['packages']['torch']}"]}


def test_a_run_begun_without_a_lineage_does_not_claim_one_for_all_its_steps(
    tmp_path: Path, base: Path, shards: Path
) -> None:
    run, run_dir = begun(tmp_path, base, shards)
    tree = json.loads(Path(run_dir, "run.json").read_text())
    del tree["lineage"]
    Path(run_dir, "run.json").write_text(json.dumps(tree))
    for _ in range(2):
        record_lineage(run, run_dir, data_of(shards), "tok", "tem", None)
    found = read_lineage(run_dir)
    assert found is not None
    assert found["continued"] == [{"step": 4, "changes": ["recorded from here on; earlier steps are unknown"]}]


def test_a_base_of_the_hub_is_known_by_its_commit_whatever_was_downloaded(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub/models--org--m/snapshots/abc123"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda _repo, name, **_: str(snapshot / name) if (snapshot / name).exists() else None,
    )
    model = config.ModelConfig(base="org/m")
    assert base_files(model) == {}
    (snapshot / "config.json").write_text("{}")
    known = base_files(model)
    assert known == {"commit": "abc123"}
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert base_files(model) == known


def test_what_changed_of_an_environment_is_told_in_words() -> None:
    then = environment()
    now = json.loads(json.dumps(then))
    assert environment_changes(then, now) == []
    now["packages"].pop("peft")
    now["packages"]["pytest"] = "0"
    now["python"], now["code"] = "4.0.0", {"commit": "abc", "sha256": "z"}
    said = environment_changes(then, now)
    assert len(said) == 3
    assert said[0].startswith("peft is missing instead of 0.")
    assert said[1].startswith("Python is 4.0.0 instead of 3.")
    assert said[2].startswith("ftray's code is abc instead of ")


def test_a_large_file_of_a_base_is_known_by_its_size_and_ends(base: Path) -> None:
    weights = base / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(WHOLE_BYTES + 10)
    model = config.ModelConfig(base=str(base))
    first = base_files(model)
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    second = base_files(model)
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors"}


def refused(run: config.RunConfig, run_dir: str, error: type[Exception], words: str, other: bool = False) -> None:
    with pytest.raises(error, match=words):
        check_before(run, run_dir, other, Console())


def test_reproducing_stops_at_what_changed_and_names_it(tmp_path: Path, base: Path, shards: Path) -> None:
    run, run_dir = begun(tmp_path, base, shards)
    known = check_before(run, run_dir, False, Console())
    check_data(known, run, data_of(shards))
    with pytest.raises(DataError, match=r"data/b\.jsonl now gives other packed sequences; restore them"):
        check_data(known, run, data_of(shards, "xz"))
    (shards / "c.jsonl").write_text("{}\n")
    refused(run, run_dir, DataError, r"data/c\.jsonl is new")
    (shards / "c.jsonl").rename(tmp_path / "c")
    (shards / "a.jsonl").rename(tmp_path / "a")
    refused(run, run_dir, DataError, r"data/a\.jsonl is gone")
    (tmp_path / "a").rename(shards / "a.jsonl")
    (base / "tokenizer.json").write_text("{}")
    refused(run, run_dir, DataError, r"tokenizer\.json of model\.base .*base changed")


def test_what_keeps_a_run_from_going_on_is_named_with_its_files(tmp_path: Path, base: Path, shards: Path) -> None:
    run, run_dir = begun(tmp_path, base, shards)
    known = read_lineage(run_dir)
    assert known is not None
    same = (known["tokenizer_hash"], known["template_hash"])
    assert what_changed(run_dir, run, data_of(shards, "xz"), *same) == (
        f"the data changed ({shards}/b.jsonl now gives other packed sequences)"
    )
    (base / "tokenizer.json").write_text("{}")
    files = f"(tokenizer.json of model.base {base} changed)"
    assert what_changed(run_dir, run, data_of(shards, "xz"), "other", same[1]) == (
        f"the tokenizer of model.base {base} changed {files}"
    )
    assert what_changed(run_dir, run, data_of(shards), "other", "other").startswith(
        f"the chat template of model.base {base} changed"
    )
    tree = json.loads(Path(run_dir, "run.json").read_text())
    del tree["lineage"]
    Path(run_dir, "run.json").write_text(json.dumps(tree))
    said = what_changed(run_dir, run, data_of(shards), *same)
    assert str(shards) in said
    assert "the tokenizer or the chat template of model.base" in said


def test_reproducing_asks_for_the_same_environment_unless_told_otherwise(
    tmp_path: Path, base: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, run_dir = begun(tmp_path, base, shards)
    now = json.loads(json.dumps(environment()))
    now["packages"]["torch"] = "9.9"
    monkeypatch.setattr("ftray.report.reproduce.environment", lambda: now)
    refused(run, run_dir, ConfigError, r"torch is 9\.9 instead of .*; restore it, or use --other-environment")
    check_before(run, run_dir, True, Console())
    assert "warning: the environment differs from the run's: torch is 9.9" in capsys.readouterr().out
    changed = config.parse_run({**run.model_dump(mode="json"), "train": {"seed": 1}}, "x")
    refused(changed, run_dir, ConfigError, "takes no overrides", other=True)
    old, old_dir = write_run(tmp_path / "old", [line(0, 1.0, 0)])
    refused(old, str(old_dir), ConfigError, "has no lineage")


def test_the_new_name_is_another() -> None:
    run = config.parse_run({"name": "a", "model": {"base": "b"}, "data": {"train": [{"path": "p"}]}}, "x")
    assert (renamed(run, None).name, renamed(run, "z").name) == ("a-again", "z")
    assert renamed(run, None).config_hash == run.config_hash
    for wrong in ("a", "a b"):
        with pytest.raises(ConfigError, match="name"):
            renamed(run, wrong)


def test_two_runs_are_compared_by_rows_losses_and_weights(tmp_path: Path) -> None:
    def made(name: str, losses: list[float], rows: str = "r", device: str = "CPU") -> str:
        lines = [line(n, loss, BEGAN_S, sequences=rows) for n, loss in enumerate(losses)]
        run_dir = write_run(tmp_path / name, lines, weights=losses)[1]
        write_session(run_dir, "1", [(0, "start", {"step": 0, "workers": 2, "device": device})])
        return str(run_dir)

    one, same = made("one", [3.0, 2.0]), made("same", [3.0, 2.0])
    assert "reproduced bit for bit: data and losses of 2 steps, and the weights of step 2" in compare_reproduction(
        one, same
    )
    with pytest.raises(RunError, match=r"differ by at most 0\.5 from step 1 on, even though both were trained on CPUs"):
        compare_reproduction(one, made("other", [3.0, 2.5]))
    with pytest.raises(RunError, match="trained on other packed sequences"):
        compare_reproduction(one, made("rows", [3.0, 2.0], rows="q"))
    bad = made("bad", [3.0, None])  # type: ignore[list-item]
    assert "at most nan from step 1 on" in compare_reproduction(made("g0", [3.0, 2.0], device="H200"), bad)
    assert "sums on GPUs" in compare_reproduction(
        made("g", [3.0, 2.0], device="H200"), made("h", [3.0, 2.1], device="H200")
    )


def card_of(files: dict[str, bytes]) -> Any:
    return ModelCard(files["MODEL_CARD.md"].decode())


def test_the_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    run, run_dir = with_two_kills(tmp_path)
    (found,) = list_checkpoints(str(run_dir))
    card = card_of(described(run, str(run_dir), found))
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["ftray", "lora"]
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {"eval_loss": 1.0, "rouge-l": 0.4}
    for words in ("the tuned model is better", "| rank, alpha | 16, 32 |", "s3://…@bucket/data", "| seed | 0 |"):
        assert words in card.text, words
    assert "hunter2" not in str(card)


def test_the_card_claims_no_base_of_the_hub_for_a_directory_and_no_figures_of_another_step(
    tmp_path: Path, base: Path, shards: Path
) -> None:
    run, run_dir = begun(tmp_path, base, shards)
    (found,) = list_checkpoints(run_dir)
    files = described(run, run_dir, found)
    card = card_of(files)
    assert card.data.base_model is None
    assert "## Evaluation" not in card.text
    lineage = read_lineage(run_dir)
    assert lineage is not None
    assert f"| id | {lineage['id']} |" in card.text
    tree = json.loads(files["lineage.json"])
    assert (tree["id"], tree["step"], tree["config"]["train"]["seed"]) == (lineage["id"], 4, 0)
    full = config.parse_run(
        {**run.model_dump(mode="json"), "method": {"type": "full"}, "model": {"base": "org/b"}}, "x"
    )
    full = full.model_copy(
        update={"data": full.data.model_copy(update={"train": [config.SourceConfig(path="hf:org/set/c:train@v1")]})}
    )
    data = card_of(described(full, run_dir, found)).data
    assert (data.library_name, data.datasets, data.base_model_relation) == ("transformers", ["org/set"], "finetune")


def test_metadata_is_yaml_that_any_reader_takes(tmp_path: Path) -> None:
    run, run_dir = with_two_kills(tmp_path)
    (found,) = list_checkpoints(str(run_dir))
    text = described(run, str(run_dir), found)["MODEL_CARD.md"].decode()
    _, front, _ = text.split("---\n", 2)
    assert yaml.safe_load(front)["model-index"][0]["name"] == "seen"
    assert storage.exists(str(run_dir))
