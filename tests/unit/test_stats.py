"""The figures say what is in the data, the warnings what to do; the page holds all of it and asks for nothing."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ftray import config
from ftray.chat.scripts import count_scripts
from ftray.data.record_table import (
    CAPITAL,
    FINAL_MARK,
    JSON_LIKE,
    MANY_LINES,
    REPEATED_LINES,
    SHORT_ANSWER,
    UNPRINTABLE,
    _flags,
)
from ftray.data.stats import DatasetStats, SplitStats, _labels, as_text, warn
from ftray.report.data_page import render_page
from tests.unit.test_duplicates import chat

DATA = config.DataConfig(train=[config.SourceConfig(path="data")])


def part(**changes: Any) -> SplitStats:
    """A data set that nothing is wrong with."""
    lengths = np.sort(np.random.default_rng(0).integers(20, 60, 1000).astype(np.int32))
    fields: dict[str, Any] = {
        "name": "train",
        "num_records": 1000,
        "num_tokens": 40_000,
        "num_trained_tokens": 10_000,
        "num_sequences": 200,
        "fill": 0.975,
        "lengths": lengths,
        "labels": None,
        "scripts": {"LATIN": 0.9, "CYRILLIC": 0.1},
        "styles": {"begin with a capital": 1.0, "have several lines": 0.5},
        "bad": {},
        "found": {},
        "left": {},
    }
    return SplitStats(**{**fields, **changes})


def test_sound_data_gives_no_warning() -> None:
    assert warn(part(), part(name="eval", num_records=100), 8, DATA) == []


TAIL = np.array([10] * 950 + [500] * 50, np.int32)
WARNINGS: list[tuple[dict[str, Any], str]] = [
    ({"num_records": 499}, "only 499 training records. Below 500"),
    (
        {"fill": 0.032},
        "the packed sequences are only 3.2% full, so most of the work is padding; lower data.max_seq_len",
    ),
    ({"num_sequences": 7}, "an epoch has 7 sequences, fewer than a global batch (8); lower train.global_batch_size"),
    ({"labels": {"a": 900, "b": 80}}, "classes are unbalanced: 900 records of 'a', but 80 of 'b'"),
    ({"labels": {"a": 90, "b": 9}}, "1 labels have fewer than 10 records ('b')"),
    ({"styles": {"begin with a capital": 0.9}}, "the style of answers is inconsistent: 90% begin with a capital"),
    ({"styles": {"begin with a capital": 0.1}}, "the style of answers is inconsistent: 10% begin with a capital"),
    ({"lengths": TAIL}, "the lengths have a long tail: the median is 10 tokens, the 99th percentile 500"),
    ({"found": {"contamination": 3}, "left": {"contamination": 3}}, "3 records overlap with the eval set"),
    ({"left": {"conflict": 2}}, "2 records have the same input as another record, but another answer"),
    (
        {"left": {"duplicate": 6, "near_duplicate": 5}},
        "11 records (1.1%) are duplicates or near-duplicates; set data.clean.duplicates",
    ),
]


@pytest.mark.parametrize(("changes", "words"), WARNINGS, ids=[w.split(":")[0] for _, w in WARNINGS])
def test_what_is_unsound_is_told_once_with_a_remedy(changes: dict[str, Any], words: str) -> None:
    (said,) = warn(part(**changes), part(name="eval"), 8, DATA)
    assert said.startswith(words)
    assert re.search(r"; |, use ", said)


def test_poor_fill_names_the_remedy_that_fits_and_is_no_matter_for_a_few_sequences() -> None:
    bare = DATA.model_copy(update={"packing": False})
    (warning,) = warn(part(fill=0.3), part(name="eval"), 8, bare)
    assert warning.endswith("set data.packing: true")
    assert warn(part(fill=0.3, num_sequences=15), part(name="eval"), 8, DATA) == []


def test_what_was_taken_out_is_no_warning() -> None:
    assert warn(part(found={"contamination": 9, "duplicate": 99}), part(name="eval"), 8, DATA) == []


def test_held_out_data_that_is_missing_or_small_is_told() -> None:
    assert "there is no eval set" in warn(part(), None, 8, DATA)[0]
    assert "only 49 eval records" in warn(part(), part(num_records=49), 8, DATA)[0]


def test_lengths_are_counted_whole() -> None:
    sound = part()
    bins = sound.histogram()
    assert sum(number for _, _, number in bins) == 1000
    assert (bins[0][0], bins[-1][1]) == (int(sound.lengths[0]), int(sound.lengths[-1]) + 1)
    assert all(a[1] == b[0] for a, b in pairwise(bins))
    assert sound.percentile(100) == int(sound.lengths[-1])
    assert sound.percentile(50) == int(np.sort(sound.lengths)[500])
    assert part(lengths=np.array([1, 2, 3, 4], np.int32)).percentile(50) == 3
    assert part(lengths=np.full(9, 5, np.int32)).histogram() == [(5, 6, 9)]
    assert part(lengths=np.zeros(0, np.int32)).histogram() == []


def test_short_answers_that_repeat_are_labels_and_others_are_not() -> None:
    def labels(answers: list[str | None], allowed: list[str] | None = None) -> dict[str, int] | None:
        return _labels(pa.chunked_array([answers[:2], answers[2:]], pa.string()), allowed)

    assert labels(["a", "b", "a", "a", "b", "a"]) == {"a": 4, "b": 2}
    assert labels(["a", "b", "c"]) is None
    assert labels(["a", None, "a", "a", "b", "a"]) is None
    assert labels(["a"] * 9) is None
    assert labels(["a"] * 9, ["a", "b"]) == {"a": 9, "b": 0}


FLAGGED = [
    ("x", SHORT_ANSWER),
    ("Yes.", CAPITAL | FINAL_MARK),
    ("a\nb", MANY_LINES),
    ('{"a": 1}', JSON_LIKE),
    ("\n".join(["same line", "other"] * 5), MANY_LINES | REPEATED_LINES),
    ("a\x00\x01\ufffdbc\x02", UNPRINTABLE),
    ("plain words, naïve café 日本", 0),
]


@pytest.mark.parametrize(("answer", "flags"), FLAGGED)
def test_answers_are_flagged_by_quality_and_style(answer: str, flags: int) -> None:
    assert _flags(chat("q", answer), answer, 2) == flags


def test_letters_are_counted_by_script() -> None:
    from collections import Counter

    counts: Counter[str] = Counter()
    count_scripts("Hi, мир! 日本 123 é ½", counts)
    assert counts == {"LATIN": 3, "CYRILLIC": 3, "CJK": 2}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that isn't closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_the_figures_and_plots_and_asks_for_nothing() -> None:
    evil = "<script>alert(1)</script>"
    stats = DatasetStats(part(labels={evil: 500, 'b"': 500}), part(name="eval"), ["look at <this>"])
    text = render_page(stats, "a <b>")
    page = Page(text)
    assert page.tags.count("svg") == 3 + 1 + 3
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not {name for name, _ in page.attributes} & {"src", "href", "onload", "onclick"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "&lt;script&gt;" in text
    assert "look at &lt;this&gt;" in text
    assert 'name="viewport"' in text
    assert "@media print" in text
    for value in ("1,000", "40,000", "97.5%", "Cyrillic"):
        assert value in text
    numbers = [float(value) for name, value in page.attributes if name in ("x", "y", "width", "height")]
    assert all(0 <= number <= 10_000 for number in numbers)


def test_the_text_holds_both_parts_and_the_warnings() -> None:
    lines = as_text(DatasetStats(part(found={"duplicate": 5}, left={"duplicate": 2}), part(name="eval"), ["do this"]))
    text = "\n".join(lines)
    for words in ("data.train", "data.eval", "5 repeat an earlier record (3 removed)", "- do this", "█"):
        assert words in text
