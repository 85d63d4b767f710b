"""The keys `ignore` and `tools` of a source reach its records, and its index is made again when they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.fuzz_records import TEMPLATE
from ftray import config
from ftray.data.chunks import DatasetSpec, pack_chunk, streams
from ftray.data.index import NO_FIELDS, Index, _missing_columns, _source_settings
from ftray.data.prepare import check_index
from ftray.data.record_table import RecordTable, describe_chunk, read_described
from ftray.data.sources import cut_source, list_shards
from ftray.errors import DataError
from tests import tiny

TOOLS: list[dict[str, Any]] = [{"name": "weather", "parameters": {"type": "object"}}]


def tokenizer() -> Any:
    made = tiny.make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def stream_of(path: Path, **source: Any) -> DatasetSpec:
    sources = [config.SourceConfig.model_validate({"path": str(path), **source})]
    return streams(config.DataConfig(max_seq_len=300, train=sources), tokenizer)[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "a", "score": 1}) + "\n")
    return path


def text_of(stream: DatasetSpec) -> str:
    """The text of the only record, or the rule that it breaks."""
    (chunk,) = cut_source(list_shards(stream.sources[0].path), 0, 1 << 20)
    packed = pack_chunk(chunk, stream)
    if packed.bad:
        return packed.bad[0].rule
    return str(tokenizer().decode(packed.sequences[0].input_ids[: packed.sequences[0].num_tokens]))


def test_ignored_keys_are_no_reason_to_reject_a_record(data: Path) -> None:
    assert text_of(stream_of(data)) == "unused_key:score"
    assert "a<|im_end|>" in text_of(stream_of(data, ignore=["score"]))


def test_the_sources_tools_are_inline_or_a_file_and_change_the_index(data: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    bare = stream_of(data, ignore=["score"])
    inline, file = (stream_of(data, ignore=["score"], tools=t) for t in (TOOLS, str(tmp_path / "tools.json")))
    assert "weather" not in text_of(bare)
    assert text_of(inline) == text_of(file)
    assert '"name": "weather"' in text_of(inline)
    assert _source_settings(inline, 0) == _source_settings(file, 0) != _source_settings(bare, 0)


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not JSON|Expecting"), ("3", "tools must be a list"), (None, "does not exist")]
)
def test_a_file_of_tools_that_cannot_be_read_is_named(
    data: Path, tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "tools.json").write_text(content)
    with pytest.raises(DataError, match=rf"tools\.json.*({words})"):
        stream_of(data, tools=str(tmp_path / "tools.json"))


def test_an_optional_column_that_no_record_of_a_source_has_is_an_error_of_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, more in (("a", {}), ("b", {"context": None})):  # a column that only some records have is no mistake
        records = [{"question": f"q{i}", "answer": "a", **more} for i in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def missing(**columns: str) -> tuple[str, ...]:
        stream = stream_of(folder, columns={"user": "{question}", "assistant": "answer", **columns})
        chunks = cut_source(list_shards(str(folder)), 0, 1 << 20)
        described = [read_described(describe_chunk(chunk, stream, NO_FIELDS))[0] for chunk in chunks]
        return _missing_columns(stream, [RecordTable(tuple(chunks), tuple(described))])

    assert missing() == missing(user="{question}[ ({context})]") == ()
    (sentence,) = missing(user="{question}[ ({contxt})]")
    assert sentence == (
        f"{folder}: no record has the column 'contxt', which its columns name; the records have answer, question. "
        "Correct the name, or remove it"
    )
    assert len(missing(tools="tols")) == 1
    with pytest.raises(DataError, match=r"data.train: .* no record has the column 'contxt'"):
        check_index(Index((), (), missing_columns=(sentence,)), stream_of(folder), "train", 0, str(tmp_path))
