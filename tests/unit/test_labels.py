"""Labels and sides: an answer outside the list is named, contradictions are found, and no added record moves another."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray.chat import Conversation, Message
from ftray.data.checks.labels import check_labels, count_labels, find_conflicts, pick_substitutes
from ftray.data.examples import split_part
from ftray.data.formats import BadRecord

LABELS = ("card lost", "card stolen", "top up")


def talk(*messages: Message) -> Conversation:
    return Conversation(messages)


def test_an_answer_outside_the_list_is_named_with_the_closest_label() -> None:
    check_labels(talk(Message("user", "q"), Message("assistant", " top up\n")), LABELS)
    with pytest.raises(
        BadRecord, match=r"the answer 'card lots' is not one of data.labels; did you mean 'card lost'\?"
    ) as e:
        check_labels(talk(Message("user", "q"), Message("assistant", "card lots")), LABELS)
    assert e.value.rule == "unknown_label"
    with pytest.raises(BadRecord, match="plain text has no answer"):
        check_labels("some text", LABELS)
    check_labels(
        talk(Message("user", "q"), Message("assistant", "hm", train=False), Message("assistant", "top up")), LABELS
    )


def test_labels_are_counted_and_those_without_a_record_too() -> None:
    counts = count_labels({"top up": 2, "card lost": 1, None: 1}, LABELS)
    assert list(counts.items()) == [("top up", 2), ("card lost", 1), ("card stolen", 0)]


def test_equal_inputs_with_different_answers_are_a_conflict_and_equal_records_are_not() -> None:
    prompts = np.array([1, 2, 1, 3, 2, 1, 0, 0], np.uint64)
    answers = np.array([7, 8, 7, 9, 9, 5, 1, 2], np.uint64)
    found = find_conflicts(prompts, answers)
    assert [(c.first, c.other, c.num_records) for c in found] == [(0, 5, 3), (1, 4, 2)]
    assert find_conflicts(prompts[:0], answers[:0]) == []


records = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**6)), max_size=120)


def sides(items: list[tuple[str, int]], fraction: float) -> list[bool]:
    """Whether each record is held out, by hash or as its class's substitute."""
    made = [{"category": stratum, "text": number} for stratum, number in items]
    held = [split_part(record, fraction) == "eval" for record in made]
    strata, numbers = np.array([ord(s) for s, _ in items], np.int64), np.array([n for _, n in items], np.uint64)
    for place in pick_substitutes(strata, numbers, np.array(held, bool), fraction):
        assert not held[place]
        held[place] = True
    return held


@given(records, records, st.sampled_from([0.05, 0.1, 0.34]))
def test_records_that_are_added_behind_move_no_record(
    old: list[tuple[str, int]], new: list[tuple[str, int]], fraction: float
) -> None:
    assert sides(old + new, fraction)[: len(old)] == sides(old, fraction)


@given(records, st.sampled_from([0.05, 0.1, 0.34]))
def test_a_class_with_enough_different_records_has_a_held_out_one(
    items: list[tuple[str, int]], fraction: float
) -> None:
    held = sides(items, fraction)
    for stratum in "abc":
        different = {number for s, number in items if s == stratum}
        if len(different) >= 1 / fraction:
            assert any(h for (s, _), h in zip(items, held, strict=True) if s == stratum)


@given(records, st.integers(0, 120), st.tuples(st.sampled_from("abc"), st.integers(0, 10**6)))
def test_a_record_put_in_between_moves_none_but_its_classs_substitutes(
    items: list[tuple[str, int]], at: int, new: tuple[str, int]
) -> None:
    before, longer = sides(items, 0.1), [*items[:at], new, *items[at:]]
    after = sides(longer, 0.1)
    del after[min(at, len(items))]
    changed = {items[i] for i in range(len(items)) if before[i] != after[i]}
    assert {stratum for stratum, _ in changed} <= {new[0]}
    assert len(changed) <= 2  # the old substitute and the new one


def test_the_share_of_each_class_is_the_fraction() -> None:
    rng = random.Random(0)
    items = [(rng.choice("aaaabbc"), n) for n in range(20_000)]
    held = sides(items, 0.1)
    for stratum in "abc":
        own = [h for (s, _), h in zip(items, held, strict=True) if s == stratum]
        assert abs(sum(own) / len(own) - 0.1) < 0.02


@given(st.lists(st.tuples(st.integers(0, 20), st.integers()), max_size=80), st.sampled_from([0.1, 0.5]))
def test_a_group_is_never_on_both_sides(items: list[tuple[int, int]], fraction: float) -> None:
    found: dict[int, set[str]] = {}
    for group, number in items:
        found.setdefault(group, set()).add(split_part({"customer": group, "n": number}, fraction, "customer"))
    assert all(len(parts) == 1 for parts in found.values())


def test_groups_are_shared_out_and_a_record_without_one_is_bad() -> None:
    held = [split_part({"customer": f"c{n}"}, 0.3, "customer") == "eval" for n in range(2000)]
    assert abs(sum(held) / 2000 - 0.3) < 0.04
    with pytest.raises(BadRecord, match=r"customer is missing, the column that data\.eval\.group names"):
        split_part({"n": 1}, 0.3, "customer")
