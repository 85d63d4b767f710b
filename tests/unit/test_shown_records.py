"""`data stats` shows the first and the longest record, one of each class, and rejected ones, with their trained tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ftray import config
from ftray.data.chunks import streams
from ftray.data.index import ChunkFacts, Index
from ftray.data.record_table import RecordTable, RequiredFields, describe_chunk, read_described
from ftray.data.shown_records import MAX_CHARS, ShownRecord, pick_records
from ftray.data.sources import cut_source, list_shards
from ftray.data.stats import DatasetStats
from ftray.report.data_page import render_page
from tests import tiny
from tests.unit.test_stats import part


def picked(path: Path, lines: list[str], labels: list[str]) -> list[ShownRecord]:
    """The records of a file, with those at even places removed by data.clean."""
    (path / "data.jsonl").write_text("".join(line + "\n" for line in lines))
    data = config.DataConfig(max_seq_len=2000, train=[config.SourceConfig(path=str(path))])
    stream = streams(data, tiny.make_tokenizer)[0]
    (chunk,) = cut_source(list_shards(str(path)), 0, 1 << 20)
    (described,) = read_described(describe_chunk(chunk, stream, RequiredFields(False, False, False, 0)))
    summary = described.summary
    facts = ChunkFacts(chunk, summary.num_records, summary.num_sequences, 1, 1, summary.digest)
    index = Index((facts,), tuple(summary.bad))
    kept = np.arange(described.batch.num_rows) > 0
    return pick_records(index, RecordTable((chunk,), (described,)), kept, stream, labels)


def line(question: str, answer: str) -> str:
    return json.dumps({"prompt": question, "completion": answer})


@pytest.fixture
def records(tmp_path: Path) -> list[ShownRecord]:
    lines = [
        line("removed", "yes"),
        line("second?", "no"),
        "{broken",
        line("third?", "yes"),
        line("long " * 300, "no"),
        line("x", "") + "\n[1",
    ]
    return picked(tmp_path, lines, ["yes", "no", "never"])


def test_each_kind_is_shown_once_with_its_place(records: list[ShownRecord]) -> None:
    titles = [record.title for record in records]
    assert titles == [
        "the first record: data.jsonl, line 2",
        "the longest record: data.jsonl, line 5",
        "a record of the class 'yes': data.jsonl, line 4",
        "a record of the class 'no': data.jsonl, line 2",
        "rejected (invalid_json): data.jsonl, line 3",
        "rejected (no_answer): data.jsonl, line 6",
    ]
    first, longest, *_, rejected, _ = records
    assert [span.text for span in first.documents[0] if span.trained] == ["no", "<|im_end|>"]
    assert sum(len(span.text) for span in longest.documents[0]) < MAX_CHARS + 60
    assert "more characters)" in longest.documents[0][-1].text
    assert rejected.note.startswith("not JSON: ")
    assert rejected.documents[0][0].text == "{broken"


def test_the_page_marks_trained_tokens_and_escapes_texts(records: list[ShownRecord]) -> None:
    page = render_page(DatasetStats(part(), None, [], records), "a run")
    assert '<span class="token trained">no</span>' in page
    assert '<span class="token trained special">&lt;|im_end|&gt;</span>' in page
    assert "data.jsonl, line 5" in page
