"""Whole documents into rows: each exactly once, never cut, never predicting across a border, with little padding."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.data.packing import IGNORE_INDEX, PackedSequence, best_fit, pack_examples, shift_labels

PAD = 0
Document = tuple[list[int], list[bool]]


def documents(lengths: list[int], seed: int = 0) -> list[Document]:
    """Documents of random ids from 1 up, each token supervised or not."""
    rng = random.Random(seed)
    return [([rng.randrange(1, 1000) for _ in range(n)], [rng.random() < 0.5 for _ in range(n)]) for n in lengths]


def pieces(row: PackedSequence) -> list[tuple[int, slice]]:
    """Each document of a row and where it lies."""
    ends = np.cumsum(row.lengths)
    return [(d, slice(int(end) - n, int(end))) for d, n, end in zip(row.documents, row.lengths, ends, strict=True)]


LENGTHS = st.lists(st.integers(1, 64), max_size=60)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(0, 5), st.booleans())
def test_every_document_lies_whole_in_one_row_with_its_labels_and_positions(
    lengths: list[int], seed: int, packing: bool
) -> None:
    given_documents = documents(lengths, seed)
    rows = pack_examples(given_documents, 64, PAD, packing)
    assert sorted(d for row in rows for d in row.documents) == list(range(len(lengths)))
    for row in rows:
        assert row.num_tokens <= 64
        assert {row.input_ids.shape, row.labels.shape, row.position_ids.shape} == {(64,)}
        for document, where in pieces(row):
            ids, mask = given_documents[document]
            n = len(ids)
            assert row.input_ids[where].tolist() == ids
            assert row.position_ids[where].tolist() == list(range(n))
            predicted = [ids[t + 1] if mask[t + 1] else IGNORE_INDEX for t in range(n - 1)]
            assert row.labels[where].tolist() == [*predicted, IGNORE_INDEX]  # the last token predicts nothing
        padding = slice(row.num_tokens, 64)
        assert set(row.input_ids[padding].tolist()) <= {PAD}
        assert set(row.labels[padding].tolist()) <= {IGNORE_INDEX}
        assert row.position_ids[padding].tolist() == list(range(64 - row.num_tokens))
    supervised = sum(sum(mask[1:]) for _, mask in given_documents)
    assert sum(row.num_trained_tokens for row in rows) == supervised


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS)
def test_no_row_could_have_been_saved_by_joining_two(lengths: list[int]) -> None:
    fills = [sum(lengths[i] for i in row) for row in best_fit(lengths, 64)]
    assert all(a + b > 64 for n, a in enumerate(fills) for b in fills[:n])
    assert all(fill <= 64 for fill in fills)


def test_documents_of_a_row_lie_in_the_order_of_the_file() -> None:
    rows = best_fit([random.Random(n).randint(1, 64) for n in range(500)], 64)
    assert all(row == sorted(row) for row in rows)


def test_packing_is_deterministic() -> None:
    lengths = [random.Random(n).randint(1, 64) for n in range(500)]
    assert best_fit(lengths, 64) == best_fit(list(lengths), 64)
    # and these places may never change: a run goes on under a newer ftray
    assert best_fit([5, 3, 8, 5, 3, 2, 8, 6, 4], 10) == [[2, 5], [6], [7, 8], [0, 3], [1, 4]]


def test_chat_data_fills_rows_of_4096_to_98_percent_and_more() -> None:
    rng = random.Random(0)
    # log-normal, as chat data is: the median has 400 tokens, one in a hundred more than 2,800; longer ones are cut off
    lengths = [min(4096, max(8, int(rng.lognormvariate(6.0, 0.85)))) for _ in range(5000)]
    rows = best_fit(lengths, 4096)
    assert sum(lengths) / (4096 * len(rows)) >= 0.98
    one_each = sum(lengths) / (4096 * len(lengths))
    assert one_each < 0.2  # what padding each record would give


def test_without_packing_each_row_holds_one_document_in_file_order() -> None:
    rows = pack_examples(documents([3, 60, 5]), 64, PAD, packing=False)
    assert [(row.documents, row.lengths) for row in rows] == [([0], [3]), ([1], [60]), ([2], [5])]


def test_a_document_as_long_as_the_row_fits_and_a_longer_or_empty_one_does_not() -> None:
    (row,) = pack_examples(documents([64]), 64, PAD)
    assert row.num_tokens == 64
    for wrong in (65, 0):
        with pytest.raises(ValueError, match=f"document 1 has {wrong} tokens; a sequence has room for 1 to 64"):
            best_fit([3, wrong], 64)
    with pytest.raises(ValueError, match="document 1 has 65 tokens; a sequence has room for 1 to 64"):
        pack_examples(documents([3, 65]), 64, PAD, packing=False)


def test_arrays_are_packed_as_lists_are() -> None:
    lists = documents([random.Random(n).randint(1, 64) for n in range(50)])
    arrays = [(np.asarray(ids, dtype=np.int32), np.asarray(mask)) for ids, mask in lists]
    for row, other in zip(pack_examples(lists, 64, PAD), pack_examples(arrays, 64, PAD), strict=True):
        assert (row.documents, row.lengths) == (other.documents, other.lengths)
        for name in ("input_ids", "labels", "position_ids"):
            assert getattr(row, name).dtype == np.int32
            assert getattr(row, name).tolist() == getattr(other, name).tolist()


def test_labels_are_shifted_once_and_only_where_the_mask_says() -> None:
    assert shift_labels([5, 6, 7, 8], [True, False, True, True]).tolist() == [IGNORE_INDEX, 7, 8, IGNORE_INDEX]
    assert shift_labels([5], [True]).tolist() == [IGNORE_INDEX]


def test_nothing_to_pack_gives_no_rows() -> None:
    assert pack_examples([], 64, PAD) == []
