"""The order of rows is a function: a permutation each epoch, exact weights, and any place found without replay."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.data.order import Cursor, Mixture, chunk_order, find_cursor, sequence_order

CHUNKS = [(f"part-{n // 4:03d}.jsonl", n % 4 * 1000) for n in range(40)]
WEIGHTS = st.lists(
    st.one_of(st.integers(1, 7).map(float), st.floats(0.001, 1000), st.sampled_from([0.1, 0.7, 1 / 3, 1e-3])),
    min_size=1,
    max_size=4,
)


def test_chunks_and_rows_are_permuted() -> None:
    assert sorted(chunk_order(CHUNKS, 0, 0, 0)) == list(range(40))
    assert sorted(sequence_order(100, 0, 0, 0, "p", 0)) == list(range(100))
    assert chunk_order(CHUNKS, 0, 0, 0) != list(range(40))
    assert chunk_order([], 0, 0, 0) == []
    assert sequence_order(1, 0, 0, 0, "p", 0) == [0]


def test_seed_epoch_and_source_each_give_another_order() -> None:
    chunks = [tuple(chunk_order(CHUNKS, *where)) for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (10, 0, 0))]
    assert len(set(chunks)) == len(chunks)
    wheres = [
        (0, 0, 0, "p", 0),
        (1, 0, 0, "p", 0),
        (0, 1, 0, "p", 0),
        (0, 0, 1, "p", 0),
        (0, 0, 0, "q", 0),
        (0, 0, 0, "p", 1),
    ]
    rows = [tuple(sequence_order(30, *where)) for where in wheres]
    assert len(set(rows)) == len(rows)


def test_the_order_follows_the_chunks_and_not_the_order_in_which_they_are_listed() -> None:
    listed = random.Random(0).sample(CHUNKS, len(CHUNKS))
    assert [listed[i] for i in chunk_order(listed, 3, 2, 1)] == [CHUNKS[i] for i in chunk_order(CHUNKS, 3, 2, 1)]


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """A run that goes on under a newer ftray must meet the same rows: these numbers may never change."""
    assert chunk_order(CHUNKS[:8], 0, 0, 0) == [1, 3, 0, 6, 4, 5, 2, 7]
    assert sequence_order(8, 7, 1, 0, "part-000.jsonl", 4096) == [4, 6, 5, 7, 3, 1, 2, 0]
    assert "".join(map(str, islice(Mixture((70, 20, 10)).sources(0), 20))) == "00100201000010020100"


def test_every_chunk_comes_first_in_some_epoch() -> None:
    firsts = Counter(chunk_order(CHUNKS[:4], 0, epoch, 0)[0] for epoch in range(400))
    assert set(firsts) == {0, 1, 2, 3}
    assert min(firsts.values()) >= 60  # 100 are expected, sigma is 8.7


def test_without_weights_each_row_comes_once_an_epoch() -> None:
    mixture = Mixture((70, 1, 13, 200))
    drawn = list(islice(mixture.sources(0), 3 * 284))
    assert mixture.sequences_per_epoch == 284
    for epoch in range(3):
        assert Counter(drawn[epoch * 284 : (epoch + 1) * 284]) == {0: 70, 1: 1, 2: 13, 3: 200}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(WEIGHTS, st.integers(0, 10**9))
def test_weights_hold_in_every_window_within_a_row_for_each_other_source(weights: list[float], seed: int) -> None:
    mixture, rng = Mixture(tuple([10] * len(weights)), tuple(weights)), random.Random(seed)
    drawn = list(islice(mixture.sources(0), 2000))
    for _ in range(60):
        low, high = sorted(rng.sample(range(2001), 2))
        counts = Counter(drawn[low:high])
        for source, share in enumerate(mixture.shares):
            assert abs(counts[source] - (high - low) * share) <= len(weights) - 1


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 2.0), (0.1, 0.9), (1.0, 1000.0)])
def test_with_two_sources_no_window_is_off_by_more_than_one_row(weights: tuple[float, float]) -> None:
    mixture = Mixture((1, 1), weights)
    ones = [0]
    for source in islice(mixture.sources(0), 700):
        ones.append(ones[-1] + source)
    share = mixture.shares[1]
    assert all(abs(ones[b] - ones[a] - (b - a) * share) <= 1 for a in range(0, 700, 3) for b in range(a, 701))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(WEIGHTS, st.integers(0, 3000))
def test_any_row_is_found_without_replaying_those_before_it(weights: list[float], start: int) -> None:
    mixture = Mixture(tuple([10] * len(weights)), tuple(weights))
    drawn = list(islice(mixture.sources(0), start + 50))
    assert list(islice(mixture.sources(start), 50)) == drawn[start:]
    assert mixture.counts(start) == [drawn[:start].count(source) for source in range(len(weights))]


def test_a_row_far_out_is_found_as_quickly_as_the_first() -> None:
    mixture = Mixture((5, 7, 11), (0.2, 0.5, 0.3))
    start = 10**15
    counts = mixture.counts(start)
    assert sum(counts) == start
    assert all(abs(c - start * share) <= 2 for c, share in zip(counts, mixture.shares, strict=True))
    ahead = Counter(islice(mixture.sources(start), 1000))
    assert mixture.counts(start + 1000) == [c + ahead[i] for i, c in enumerate(counts)]


def test_an_epoch_under_weights_is_one_pass_over_the_relatively_largest_source() -> None:
    mixture = Mixture((100, 900), (0.5, 0.5))
    assert mixture.sequences_per_epoch == 1800
    assert mixture.counts(1800) == [900, 900]  # the small one nine times
    assert Mixture((100, 900), (1, 9)).sequences_per_epoch == 1000
    mixture = Mixture((7, 5), (0.7, 0.3))
    counts = mixture.counts(mixture.sequences_per_epoch)
    assert all(c >= n for c, n in zip(counts, (7, 5), strict=True))


def replay(sequences_by_chunk: list[int], seed: int, source: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, place of the chunk, row) of each row of a source, one after the other."""
    epoch = 0
    while True:
        for place, i in enumerate(chunk_order(CHUNKS[: len(sequences_by_chunk)], seed, epoch, source)):
            for row in range(sequences_by_chunk[i]):
                yield epoch, place, row
        epoch += 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 3), st.integers(0, 3))
def test_a_cursor_is_where_replay_arrives(sequences_by_chunk: list[int], seed: int, source: int) -> None:
    chunks = CHUNKS[: len(sequences_by_chunk)]
    for k, where in enumerate(islice(replay(sequences_by_chunk, seed, source), 3 * sum(sequences_by_chunk) + 1)):
        assert find_cursor(k, sequences_by_chunk, chunks, seed, source) == Cursor(*where)
