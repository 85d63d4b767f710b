"""Order and resume through the real pipeline: which rows a step takes depends on data and settings alone (P1)."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftray.data.loader import LoadPlan, share_sequences
from ftray.data.sources import list_shards
from ftray.data.verify import trace_order
from ftray.errors import DataError, innermost
from tests import cluster, rows, tiny
from tests.s3 import FaultyProxy, S3Server

NUM_STOPS = 5  # bench/order_proof.py makes 50 and more


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows.save_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sources of about 60 and 150 records."""
    root = tmp_path_factory.mktemp("sources")
    return [tiny.write_records(root / "a", 60), tiny.write_records(root / "b", 150, seed=1, shape="alpaca")]


@pytest.fixture(scope="module", autouse=True)
def with_ray() -> Iterator[None]:
    with cluster.local_ray():
        yield


@pytest.fixture(scope="module")
def plan(base: Path, sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> LoadPlan:
    """A run without weights of two and a half epochs, whose epochs don't end where a step does."""
    found = rows.make_plan(
        tmp_path_factory.mktemp("plain"),
        base,
        [{"path": str(path)} for path in sources],
        train__global_batch_size=8,
        train__max_steps=None,
        train__epochs=2.5,
        scale__num_workers=1,
    )
    assert found.mixture.sequences_per_epoch % 8, "the epoch must have a tail, or carrying it over is not tried"
    assert min(len(chunks) for chunks in found.sources) >= 4
    return found


@pytest.fixture(scope="module")
def weighted(base: Path, sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> LoadPlan:
    return rows.make_plan(
        tmp_path_factory.mktemp("weighted"),
        base,
        [{"path": str(path), "weight": weight} for path, weight in zip(sources, (0.7, 0.3), strict=True)],
        train__global_batch_size=8,
        train__max_steps=25,
        scale__num_workers=1,
    )


@pytest.mark.parametrize("which", ["plan", "weighted"])
def test_any_world_size_gives_each_step_the_same_rows(which: str, request: pytest.FixtureRequest) -> None:
    plan: LoadPlan = request.getfixturevalue(which)
    expected = dict(enumerate(rows.expected_steps(plan)))
    for world_size in (1, 2, 4):
        assert rows.fed_steps(plan, world_size) == expected


@pytest.mark.parametrize("which", ["plan", "weighted"])
def test_rows_that_several_runs_share_come_in_the_same_order(which: str, request: pytest.FixtureRequest) -> None:
    plan: LoadPlan = request.getfixturevalue(which)
    assert share_sequences(plan, most_bytes=1000) is None, "too many bytes"
    shared = replace(plan, packed=share_sequences(plan, most_bytes=1e9))
    assert shared.packed is not None
    expected = dict(enumerate(rows.expected_steps(plan)))
    assert rows.fed_steps(shared, 2) == expected
    late = plan.num_steps - 3
    assert rows.fed_steps(shared, 4, late) == {step: expected[step] for step in range(late, plan.num_steps)}


def test_each_row_comes_once_an_epoch_and_the_tail_is_carried_over(plan: LoadPlan) -> None:
    fed = rows.fed_steps(plan, 2)
    drawn = [row for step in sorted(fed) for row in fed[step]]
    per_epoch = plan.mixture.sequences_per_epoch
    there = {
        (s, c, r)
        for s, chunks in enumerate(plan.sources)
        for c, facts in enumerate(chunks)
        for r in range(facts.num_sequences)
    }
    assert len(there) == per_epoch
    for epoch in range(2):
        seen = Counter((s, c, r) for s, e, c, r, _ in drawn[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert set(seen) == there
        assert set(seen.values()) == {1}
        assert {e for _, e, *_ in drawn[epoch * per_epoch : (epoch + 1) * per_epoch]} == {epoch}
    border = fed[per_epoch // plan.global_batch_size]
    assert {e for _, e, *_ in border} == {0, 1}
    assert len(drawn) == plan.num_steps * 8 == int(2.5 * per_epoch) // 8 * 8


def test_weights_hold_in_every_window_of_rows(weighted: LoadPlan) -> None:
    fed = rows.fed_steps(weighted, 4)
    drawn = [row[0] for step in sorted(fed) for row in fed[step]]
    assert len(drawn) == 200
    for low in range(0, 200, 7):
        for high in range(low + 1, 201, 5):
            assert abs(drawn[low:high].count(0) - 0.7 * (high - low)) <= 1


@pytest.mark.long
def test_after_a_stop_anywhere_at_any_world_size_the_rest_is_the_same(plan: LoadPlan) -> None:
    expected = rows.expected_steps(plan)
    rng = random.Random(0)
    world_size, starts = 1, []
    for _ in range(NUM_STOPS):
        world_size = rng.choice([w for w in (1, 2, 4) if w != world_size])
        start = rng.randrange(1, plan.num_steps)
        starts.append(start)
        assert rows.fed_steps(plan, world_size, start) == dict(list(enumerate(expected))[start:])
    assert len(set(starts)) >= NUM_STOPS - 1


def test_the_records_told_are_those_in_the_rows(plan: LoadPlan) -> None:
    expected = [record for _, (_, found) in zip(range(16), rows.replay(plan), strict=False) for record in found]
    told = [tuple(record) for entry in trace_order(plan, 2, 0, 0, 2) for record in entry["records"]]
    assert told == expected


def test_an_entry_is_as_it_was_promised(plan: LoadPlan) -> None:
    (entry,) = trace_order(plan, 1, 3, 4, 5)
    assert list(entry) == ["step", "rank", "sequences", "records"]
    assert (entry["step"], entry["rank"]) == (4, 0)
    assert all(len(row) == 5 and len(row[4]) == 64 for row in entry["sequences"])
    json.dumps(entry)


def one_chunk_a_file(directory: Path, number: int) -> Path:
    """Records in files so small that each is one chunk."""
    directory.mkdir()
    for n in range(number):
        tiny.write_records(directory / "new", 12, seed=n)
        (directory / "new/part-000.jsonl").rename(directory / f"part-{n:03d}.jsonl")
    (directory / "new").rmdir()
    return directory


def test_resume_reads_no_chunk_that_lies_behind_it(base: Path, tmp_path: Path) -> None:
    data = one_chunk_a_file(tmp_path / "data", 24)
    plan = rows.make_plan(
        tmp_path / "run",
        base,
        [{"path": str(data)}],
        data__chunk_mb=0.02,
        train__max_steps=None,
        train__epochs=1,
        scale__num_workers=1,
    )
    expected = rows.expected_steps(plan)
    start = plan.num_steps * 3 // 4
    needed = {row[2] for step in expected[start:] for row in step}
    for number, facts in enumerate(plan.sources[0]):
        if number not in needed:
            Path(facts.chunk.uri).unlink()
    assert len(list(data.iterdir())) <= 8
    assert rows.fed_steps(plan, 2, start) == dict(list(enumerate(expected))[start:])
    with pytest.raises(Exception, match=r"part-\d+\.jsonl"):  # and reading one of the others would have been noticed
        rows.fed_steps(plan, 2, 0)


def test_a_shard_that_changes_under_the_feed_is_refused_by_name(
    base: Path, sources: list[Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sources[0], data)
    plan = rows.make_plan(tmp_path / "run", base, [{"path": str(data)}])
    shard = data / "part-001.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"moo", b"boo"))
    with pytest.raises(Exception, match=r"part-001\.jsonl changed while the run was using it") as caught:
        rows.fed_steps(plan, 2)
    assert isinstance(innermost(caught.value), DataError)


def test_a_shard_of_the_same_size_and_time_with_other_content_is_refused_by_name(
    base: Path, sources: list[Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sources[0], data)
    plan = rows.make_plan(tmp_path / "run", base, [{"path": str(data)}])
    shard = data / "part-001.jsonl"
    status = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"moo", b"boo"))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shard.stat().st_size == status.st_size
    assert {f.chunk.etag for f in plan.sources[0] if f.chunk.path == shard.name} == {list_shards(str(data))[1].etag}
    with pytest.raises(Exception, match=r"part-001\.jsonl no longer gives the sequences that were indexed") as caught:
        rows.fed_steps(plan, 2)
    assert isinstance(innermost(caught.value), DataError)


def test_local_disk_and_s3_give_the_same_rows_also_when_a_third_of_the_requests_fail(
    base: Path, sources: list[Path], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = rows.make_plan(
        tmp_path / "local", base, [{"path": str(sources[0])}], train__max_steps=6, data__chunk_mb=0.001
    )
    expected = dict(enumerate(rows.expected_steps(local)))
    for path in sources[0].iterdir():
        assert s3.request("PUT", f"/data/faulty/{path.name}", path.read_bytes())[0] == 200
    with FaultyProxy(s3.endpoint, 0.3, ("503", "reset", "cut")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        cluster.restart_ray()  # its workers take the environment that Ray was started in
        remote = rows.make_plan(
            tmp_path / "s3", base, [{"path": "s3://data/faulty/"}], train__max_steps=6, data__chunk_mb=0.001
        )
        assert remote.sources[0][0].chunk.uri.startswith("s3://")
        assert rows.fed_steps(remote, 2) == expected
        spoiled = sum(proxy.count[kind] for kind in ("503", "reset", "cut"))
        assert spoiled >= max(10, 0.15 * sum(proxy.count.values()))


def test_small_files_and_joined_texts_keep_exact_counts_and_order(base: Path, tmp_path: Path) -> None:
    for n in range(200):
        record: dict[str, Any] = {"text": f"The hen of farm {n} clucks. " * 3}
        if n % 4 == 0:
            record = {"prompt": f"What does the hen of farm {n} say?", "completion": "cluck"}
        (tmp_path / "data" / f"{n % 7}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{n % 7}/f{n:03d}.jsonl").write_text(json.dumps(record) + "\n")
    plan = rows.make_plan(
        tmp_path / "run",
        base,
        [{"path": str(tmp_path / "data")}],
        data__pack_text="concatenate",
        data__chunk_mb=1.0,
        data__max_seq_len=256,
        train__global_batch_size=4,
        train__max_steps=None,
        train__epochs=2,
        scale__num_workers=1,
    )
    (facts,) = plan.sources[0]
    assert (facts.num_records, len(facts.chunk.pieces)) == (200, 200)
    assert facts.num_tokens > 0.95 * 256 * facts.num_sequences
    expected = rows.expected_steps(plan)
    assert sum(len(step) for step in expected) == plan.num_steps * 4
    for world_size, start in ((1, 0), (2, 5), (4, plan.num_steps - 2)):
        assert rows.fed_steps(plan, world_size, start) == dict(list(enumerate(expected))[start:])
    seen = {
        record for step, _ in zip(rows.replay(plan), range(facts.num_sequences), strict=False) for record in step[1]
    }
    assert len(seen) == 200
