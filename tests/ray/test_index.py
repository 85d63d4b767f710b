"""The index knows the whole set before training: copies, leaks, sides, labels, and exactly what is taken out."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.fuzz_records import write_spoiled
from ftray import config
from ftray.console import Console
from ftray.data import index as index_module
from ftray.data.chunks import DatasetSpec, pack_chunk, streams
from ftray.data.index import Index, build_index, read_record_table
from ftray.data.loader import eval_table, make_plan
from ftray.data.prepare import check_index, prepare_data, read_summary
from ftray.data.stats import show_stats
from ftray.errors import DataError
from ftray.model.load import load_tokenizer
from ftray.report.data_page import render_page
from tests import cluster, tiny
from tests.rows import read_findings

CHUNK_BYTES, HASH = 4000, "tokenizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tiny.write_tiny_model(tmp_path_factory.mktemp("model"))
    with cluster.local_ray(2):
        yield directory


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that a pass read, a line for each chunk."""
    read: list[str] = []
    real = index_module.map_in_order

    def spy(function: Callable[..., bytes], items: Any) -> Iterator[bytes]:
        read.extend(Path(chunk.uri).name for _, chunk in items)
        return real(function, items)

    monkeypatch.setattr(index_module, "map_in_order", spy)
    return read


def data_of(train: Path, **keys: Any) -> config.DataConfig:
    return config.DataConfig(**{"max_seq_len": 256, "train": [{"path": str(train)}], **keys})


def both_streams(model: Path, data: config.DataConfig) -> tuple[DatasetSpec, DatasetSpec | None]:
    return streams(data, partial(load_tokenizer, config.ModelConfig(base=str(model))))


def indexed(model: Path, directory: Path, data: config.DataConfig) -> tuple[Index, Index | None]:
    stream, heldout = both_streams(model, data)
    of = [build_index(s, CHUNK_BYTES, str(directory), HASH) if s else None for s in (stream, heldout)]
    assert of[0] is not None
    return of[0], of[1]


def positions(model: Path, index: Index, data: config.DataConfig, heldout: bool = False) -> list[tuple[str, int]]:
    """(path, position) of every record in the rows, as the pipeline makes them."""
    stream = both_streams(model, data)[heldout]
    assert stream is not None
    table = eval_table(index, stream)
    chunks = [index.facts[i].chunk.path for i in table.column("chunk").to_pylist()]
    return [
        (path, at) for path, records in zip(chunks, table.column("records").to_pylist(), strict=True) for at in records
    ]


def sentences(number: int, seed: int) -> list[dict[str, Any]]:
    """Records of their own words; question and answer share none with another's but by chance."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefghijklmnoprstuvwz") for _ in range(rng.randint(3, 8))) for _ in range(2000)]

    def say(length: int) -> str:
        return " ".join(rng.choice(words) for _ in range(length)) + "."

    return [{"prompt": say(14), "completion": say(6), "category": rng.choice("aaab"), "id": n} for n in range(number)]


def write(path: Path, records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Writes a shard; returns (file name, byte offset) of each record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines))
    starts = [sum(len(line) for line in lines[:i]) for i in range(len(lines))]
    return [(path.name, start) for start in starts]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """120 records in four shards, with 6 equal, 8 near and 5 leaked ones among them; where they lie, by rule."""
    root = tmp_path_factory.mktemp("planted")
    clean, heldout = sentences(101, seed=1), sentences(30, seed=2)
    copies = [("duplicate", {**clean[n], "prompt": f"  {clean[n]['prompt']}\n"}) for n in range(6)]
    for n in range(10, 18):
        text = clean[n]["prompt"]
        first, second, *rest = text.split()
        ways = [
            text.upper(),
            text.replace(" ", ", ", 2),
            " ".join([second, first, *rest]),
            text.replace(first, "new", 1),
        ]
        copies.append(("near_duplicate", {**clean[n], "prompt": ways[n % 4]}))
    for n in range(5):
        asked = heldout[n]["prompt"]
        text = asked if n < 2 else f"Before all that, a few other words. {asked} And after it some more of them."
        copies.append(("contamination", {"prompt": text, "completion": heldout[n]["completion"]}))
    marked = [("", record) for record in clean] + copies
    places: dict[str, set[tuple[str, int]]] = {
        rule: set() for rule in ("", "duplicate", "near_duplicate", "contamination")
    }
    for shard in range(4):
        part = marked[shard * 30 : shard * 30 + 30]
        for (rule, _), place in zip(part, write(root / f"train/s{shard}.jsonl", [r for _, r in part]), strict=True):
            places[rule].add(place)
    write(root / "eval/e.jsonl", heldout)
    return {"train": root / "train", "eval": root / "eval", "places": places}


def rules_found(index: Index, directory: Path) -> dict[str, set[tuple[str, int]]]:
    found: dict[str, set[tuple[str, int]]] = {}
    for f in read_findings(index, str(directory)):
        found.setdefault(f.rule, set()).add((Path(f.uri).name, f.position))
    return found


def test_planted_copies_and_leaks_are_found_and_nothing_else(
    model: Path, planted: dict[str, Any], tmp_path: Path
) -> None:
    data = data_of(planted["train"], eval=[{"path": str(planted["eval"])}])
    index, heldout = indexed(model, tmp_path, data)
    places = planted["places"]
    assert rules_found(index, tmp_path) == {
        rule: places[rule] for rule in ("duplicate", "near_duplicate", "contamination")
    }
    assert index.found == {rule: (len(places[rule]),) * 2 for rule in index.found}
    assert not any(f.dropped for f in read_findings(index, str(tmp_path)))
    assert index.total("num_records") == 120
    assert heldout is not None
    assert (heldout.total("num_records"), heldout.found) == (30, {})
    named = {f.rule: f.of_uri for f in read_findings(index, str(tmp_path))}
    assert {rule: Path(str(uri)).name for rule, uri in named.items()} == {
        "duplicate": "s0.jsonl",
        "near_duplicate": "s0.jsonl",
        "contamination": "e.jsonl",
    }
    off = data.model_copy(
        update={"clean": config.CleanConfig(duplicates="off", near_duplicates="off", contamination="off")}
    )
    assert indexed(model, tmp_path, off)[0].found == {}


def test_drop_takes_out_exactly_these_records_and_the_steps_follow(
    model: Path, planted: dict[str, Any], tmp_path: Path
) -> None:
    told = data_of(planted["train"], eval=[{"path": str(planted["eval"])}])
    drop = told.model_copy(
        update={"clean": config.CleanConfig(duplicates="drop", near_duplicates="drop", contamination="drop")}
    )
    index, _ = indexed(model, tmp_path, told)
    dropping, heldout = indexed(model, tmp_path, drop)
    places = planted["places"]
    everything = positions(model, index, told)
    kept = positions(model, dropping, drop)
    assert len(set(everything)) == len(everything) == 120
    assert sorted(kept) == sorted(places[""])
    assert len(kept) == dropping.total("num_records") == 101
    gone = {(Path(q.uri).name, q.position) for q in dropping.dropped}
    assert gone == set(everything) - set(kept)
    # a chunk in which nothing was dropped gives the same rows; and the whole is the same made anew elsewhere
    for before, after in zip(index.facts, dropping.facts, strict=True):
        assert (before.digest == after.digest) == (not after.chunk.dropped)
    again, _ = indexed(model, tmp_path / "again", drop)
    assert again == dropping
    assert again.data_hash == dropping.data_hash != index.data_hash
    plans = [make_plan(i, both_streams(model, d)[0], 0, 4, 1.0, None) for i, d in ((index, told), (dropping, drop))]
    assert [p.num_steps for p in plans] == [i.total("num_sequences") // 4 for i in (index, dropping)]
    assert plans[1].num_steps < plans[0].num_steps
    assert heldout is not None
    assert heldout.total("num_records") == 30
    # wanted, so that no budget is touched; each is named with what it repeats
    stream, _ = both_streams(model, drop)
    check_index(dropping, stream, "train", 0, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "quarantine/train.jsonl").read_text().splitlines()]
    assert len(lines) == 19
    assert {line["rule"] for line in lines} == {"duplicate", "near_duplicate", "contamination"}
    assert all(Path(line["uri"]).exists() and line["line"] and line["excerpt"] and line["fix"] for line in lines)
    assert all("s0.jsonl" in line["detail"] for line in lines if line["rule"] != "contamination")
    assert all("e.jsonl" in line["detail"] for line in lines if line["rule"] == "contamination")


def test_only_a_new_shard_is_read(model: Path, tmp_path: Path, seen: list[str]) -> None:
    for n in range(3):
        write(tmp_path / f"data/s{n}.jsonl", sentences(30, seed=n))
    data = data_of(tmp_path / "data", eval={"fraction": 0.2})
    indexed(model, tmp_path / "run", data)
    assert set(seen) == {"s0.jsonl", "s1.jsonl", "s2.jsonl"}
    num_chunks = len(seen)
    assert num_chunks > 6  # several a shard, for both sides
    seen.clear()
    indexed(model, tmp_path / "run", data)
    assert seen == []
    write(tmp_path / "data/s0a.jsonl", sentences(30, seed=0)[:20])
    index, heldout = indexed(model, tmp_path / "run", data)
    assert set(seen) == {"s0a.jsonl"}
    assert index.found["duplicate"][0] > 0  # of records in a shard that wasn't read again
    assert (index, heldout) == indexed(model, tmp_path / "fresh", data)
    seen.clear()
    changed = tmp_path / "data/s1.jsonl"
    changed.write_text(changed.read_text().replace("a", "e", 1))  # of the same size and cuts; it is read
    indexed(model, tmp_path / "run", data)
    assert set(seen) == {"s1.jsonl"}


def test_each_class_is_held_out_from_and_added_data_moves_nothing(model: Path, tmp_path: Path) -> None:
    rare = [{"prompt": f"rare {n}", "completion": "yes.", "category": f"r{n % 9}"} for n in range(54)]
    write(tmp_path / "data/s0.jsonl", sentences(60, seed=1) + rare)
    data = data_of(tmp_path / "data", eval={"fraction": 0.2, "stratify": "category"})

    def sides() -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
        index, heldout = indexed(model, tmp_path / "run", data)
        assert heldout is not None
        found = positions(model, index, data), positions(model, heldout, data, heldout=True)
        assert len(found[0]) == len(set(found[0]))
        return set(found[0]), set(found[1])

    train, held = sides()
    assert not train & held
    assert len(train | held) == 114
    lines = (tmp_path / "data/s0.jsonl").read_bytes()
    kinds = {json.loads(lines[at:].split(b"\n", 1)[0])["category"] for _, at in held}
    assert kinds == {"a", "b", *(f"r{n}" for n in range(9))}
    hashes_alone = data_of(tmp_path / "data", eval={"fraction": 0.2})
    plain = indexed(model, tmp_path / "plain", hashes_alone)[1]
    assert plain is not None
    assert plain.total("num_records") < len(held), "no class needed a substitute, so nothing was tried"
    write(tmp_path / "data/s1.jsonl", sentences(60, seed=2) + rare[:20] + [{**r, "category": "new"} for r in rare[:7]])
    more_train, more_held = sides()
    assert train <= more_train
    assert held <= more_held
    assert len(more_train | more_held) == 114 + 87


def test_a_group_stays_together_and_a_record_without_one_is_named(model: Path, tmp_path: Path) -> None:
    records = [{**r, "customer": f"c{n % 20}"} for n, r in enumerate(sentences(100, seed=1))]
    del records[50]["customer"]
    write(tmp_path / "data/s0.jsonl", records)
    data = data_of(tmp_path / "data", eval={"fraction": 0.3, "group": "customer"})
    index, heldout = indexed(model, tmp_path / "run", data)
    assert heldout is not None
    (bad,) = index.bad
    assert (bad.rule, heldout.bad) == ("missing_field", ())
    assert "customer is missing" in bad.detail
    lines = (tmp_path / "data/s0.jsonl").read_bytes()
    sides = [
        {json.loads(lines[at:].split(b"\n", 1)[0])["customer"] for _, at in positions(model, i, data, i is heldout)}
        for i in (index, heldout)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0]) > len(sides[1]) > 0


def test_labels_bound_the_answers_and_conflicts_are_told(model: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"case {n} of the list", "completion": ("yes", "no")[n % 2]} for n in range(40)]
    records[7]["completion"] = "yess"
    write(tmp_path / "data/s0.jsonl", [*records, {**records[4], "completion": "no"}])
    data = data_of(tmp_path / "data", labels=["yes", "no"], max_bad_records=1)
    index, _ = indexed(model, tmp_path / "run", data)
    (bad,) = index.bad
    assert (bad.rule, bad.fix) == ("unknown_label", "correct the answer, or add it to data.labels")
    assert "did you mean 'yes'?" in bad.detail
    conflicts = [f for f in read_findings(index, str(tmp_path / "run")) if f.rule == "conflict"]
    assert [Path(str(f.of_uri)).name for f in conflicts] == ["s0.jsonl"]
    stream, _ = both_streams(model, data)
    survey = read_record_table(index, str(tmp_path / "run"))
    assert sorted(set(survey.texts("label").to_pylist())) == ["no", "yes"]
    with pytest.raises(
        DataError,
        match=r"1 bad record \(1 unknown_label\)\. The limit data\.max_bad_records is 0\. .*line 8: the answer 'yess'",
    ):
        check_index(index, stream, "train", 0, str(tmp_path / "run"))


def test_fuzzed_records_are_rows_or_quarantined_and_none_vanishes(model: Path, tmp_path: Path) -> None:
    num_lines = write_spoiled(tmp_path / "data" / "s0.jsonl", 1500, seed=3)
    data = data_of(tmp_path / "data", eval={"fraction": 0.2}, max_seq_len=200)
    index, heldout = indexed(model, tmp_path / "run", data)
    assert heldout is not None
    rows = [positions(model, i, data, i is heldout) for i in (index, heldout)]
    quarantined = [(Path(q.uri).name, q.position) for q in (*index.bad, *heldout.bad)]
    everything = [*rows[0], *rows[1], *quarantined]
    assert len(everything) == len(set(everything)) == num_lines
    assert len(rows[0]) > 100
    assert len(quarantined) > 500
    stream, _ = both_streams(model, data)
    with pytest.raises(DataError, match="bad records"):
        check_index(index, stream, "train", 0, str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run/quarantine/train.jsonl").read_text().splitlines()]
    assert len(lines) == len(index.bad)
    assert all({"uri", "position", "rule", "detail", "excerpt", "fix"} <= line.keys() for line in lines)
    assert all(line["fix"] and line["detail"] for line in lines)


def test_the_statistics_tell_all_of_it_without_reading_again(
    model: Path, planted: dict[str, Any], tmp_path: Path, seen: list[str]
) -> None:
    run = cluster.make_run(
        tmp_path,
        model,
        planted["train"],
        data__max_seq_len=256,
        data__eval=[{"path": str(planted["eval"])}],
        data__clean={"duplicates": "drop"},
    )
    run_dir, stream = str(tmp_path / "tiny"), io.StringIO()
    load = partial(load_tokenizer, run.model)
    data = prepare_data(run, run_dir, Console(stream), load, HASH)
    seen.clear()
    stats = show_stats(data, run, run_dir, Console(stream))
    (tmp_path / "stats.html").write_text(render_page(stats, run.name))
    assert seen == []
    train, heldout = stats.train, stats.eval_set
    assert heldout is not None
    assert (train.num_records, heldout.num_records) == (114, 30)
    assert len(train.lengths) == 114
    assert int(train.lengths.sum()) == train.num_tokens == data.index.total("num_tokens")
    assert train.found == {"near_duplicate": 8, "duplicate": 6, "contamination": 5}
    assert train.left == {"near_duplicate": 8, "contamination": 5}
    assert train.num_sequences == data.index.total("num_sequences")
    packed = [row for facts in data.index.facts for row in pack_chunk(facts.chunk, data.plan.stream).sequences]
    assert data.plan.most_documents == data.index.most_documents == max(len(row.lengths) for row in packed) > 1
    summary = read_summary(run, run_dir)
    assert summary is not None
    assert summary["train"]["most_documents"] == data.index.most_documents
    reference = json.loads(Path(run_dir, "data/reference.json").read_text())
    deciles = reference["prompt_tokens"]
    assert len(deciles) == 9
    assert deciles == sorted(deciles)
    assert 0 < deciles[4] < train.percentile(50)  # without the answers
    assert reference["scripts"] == pytest.approx(train.scripts, abs=1e-6)
    assert "6 repeat an earlier record (6 removed)" in stream.getvalue()
    assert "only 114 training records" in stream.getvalue()
    assert (tmp_path / "stats.html").read_text().count("<svg") > 2
    findings = [
        json.loads(line) for line in (tmp_path / "tiny/data" / str(data.index.findings)).read_text().splitlines()
    ]
    assert len(findings) == 19
    assert all(f["detail"] and f["line"] for f in findings)
