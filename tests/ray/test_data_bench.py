"""The data benchmarks, small: they run, compare the same rows, and their ratios point the right way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench import data_memory, data_speed, packing_fill
from bench.data_corpus import write_corpus
from ftray import config
from ftray.data.tokenizer import TokenizerLoader
from ftray.model.load import load_tokenizer
from tests import cluster, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[config.ModelConfig]:
    with cluster.local_ray(2):
        yield config.ModelConfig(base=str(tiny.write_tiny_model(tmp_path_factory.mktemp("model"))))


def test_the_quick_way_gives_the_rows_of_the_plain_one_at_a_fraction_of_the_cost(
    base: config.ModelConfig, tmp_path: Path
) -> None:
    found = data_speed.measure(write_corpus(tmp_path, 1.2, shard_mb=0.3), base)
    assert found["equal"]
    assert found["num_tokens"] > 100_000
    assert found["engine"] == "fastokens"
    assert found["ratio"] >= 3


def test_rows_are_full_in_one_streaming_pass(base: config.ModelConfig, tmp_path: Path) -> None:
    source = config.SourceConfig(path=str(write_corpus(tmp_path, 0.6, shard_mb=0.6)))
    load = TokenizerLoader(partial(load_tokenizer, base))
    large, small = (packing_fill.measure_fill(source, load, 4096, chunk_mb) for chunk_mb in (0.3, 0.05))
    assert large["records"] == small["records"]
    assert large["tokens"] == small["tokens"]
    assert large["fill"] > 0.97
    assert large["fill"] > small["fill"]
    best = packing_fill.measure_best_fit(5000)
    assert best["fill"] > 0.99


def test_indexing_streaming_and_resuming_keep_to_their_memory(base: config.ModelConfig, tmp_path: Path) -> None:
    directory = write_corpus(tmp_path, 3, shard_mb=1)
    index, stream, resume = data_memory.measure(directory, base, chunk_mb=0.25, batch=4, clean="off")
    assert index["chunks"] >= 12
    assert stream["steps"] == index["rows"] // 4
    assert resume["steps"] == 4
    for phase in (index, stream, resume):
        for name in ("driver_mb", "largest_worker_mb", "object_store_mb"):
            assert all(isinstance(peak, int) for peak in phase[name])
    # what is streamed is about ten times this, if anything kept it
    assert max(stream["driver_mb"]) < min(stream["driver_mb"]) + 300
