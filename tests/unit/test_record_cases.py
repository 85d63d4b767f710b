"""Small files that other trainers read wrongly: each gives the right trained text, or a sentence that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftray.chat import ChatFormat
from ftray.data.examples import Example, Rules, read_examples
from ftray.data.sources import cut_shard, list_shards
from ftray.errors import DataError
from tests import tiny

CHAT = ChatFormat(tiny.make_tokenizer())
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
BAD_TURN = {"from": "gpt", "value": "BAD"}


def outcomes(path: Path, columns: dict[str, str] | None = None) -> list[str]:
    """For each record, its trained text without end tokens, or the rule that it breaks."""
    items = [
        item
        for shard in list_shards(str(path))
        for chunk in cut_shard(shard, 0, 1 << 20)
        for item in read_examples(chunk, CHAT, Rules(300, "auto", columns, None, None))
    ]
    return [trained(item) if isinstance(item, Example) else f"{item.rule}: {item.detail}" for item in items]


def trained(example: Example) -> str:
    ids = [int(i) for i, on in zip(example.encoded.input_ids, example.encoded.loss_mask, strict=True) if on]
    return CHAT.decode(ids).replace("<|im_end|>", "")


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"conversations": [HUMAN, {**BAD_TURN, "train": False}, HUMAN, GPT]}, "a"),
        ({"conversations": [HUMAN, {**BAD_TURN, "weight": 0}, HUMAN, {**GPT, "weight": 1}]}, "a"),
        ({"conversations": [HUMAN, {**BAD_TURN, "loss": False}, HUMAN, {**GPT, "loss": True}]}, "a"),
        ({"conversations": [HUMAN, {**GPT, "score": 1}]}, "bad_turn: turn 1 (assistant) has the key score"),
        ({"messages": [USER, {**ANSWER, "content": "BAD", "loss": False}, USER, ANSWER]}, "a"),
        ({"messages": [USER, {**ANSWER, "train": None}]}, "a"),
        (
            {"messages": [USER, ANSWER], "images": ["1.jpg"]},
            "unused_key:images: it has the key images, but ftray trains",
        ),
        ({"conversations": [HUMAN, GPT], "image": "1.jpg"}, "unused_key:image: it has the key image, but ftray trains"),
        (
            {"conversations": [HUMAN, GPT, HUMAN], "chosen": GPT, "rejected": BAD_TURN},
            "unused_key:chosen: it has the key",
        ),
        ({"prompt": "q", "completion": "BAD", "label": False}, "unused_key:label: it has the key label, which rates"),
        ({"messages": [USER, ANSWER], "label": False}, "unused_key:label: it has the key label, which rates"),
        ({"text": "Plain text"}, "Plain text"),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": "a"}]}]}, "a"),
        ({"messages": [HUMAN, GPT]}, "a"),
        ({"conversations": [USER, ANSWER]}, "a"),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}, GPT]},
            "bad_turn: turn 1 (assistant), tool call",
        ),
        ({"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]}, "a"),
        ({"messages": [{"role": "User", "content": "q"}, ANSWER]}, "a"),
        ({"messages": json.dumps([USER, ANSWER])}, "a"),
        ({"prompt": [USER], "completion": [ANSWER]}, "a"),
        ({"messages": None, "prompt": "q", "completion": "a"}, "a"),
        ({"messages": [USER, ANSWER], "tools": "[]"}, "a"),
        ({"messages": [USER, ANSWER], "tools": "null"}, "a"),
    ],
)
def test_a_record_trains_on_its_answer_or_is_rejected_by_name(
    tmp_path: Path, record: dict[str, Any], wanted: str
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    (outcome,) = outcomes(tmp_path)
    assert outcome[: len(wanted)] == wanted


def test_dollys_context_and_orcas_empty_system_prompt_are_mapped_by_columns(tmp_path: Path) -> None:
    dolly = {"instruction": "Where?", "context": "Born in London.", "response": "London", "category": "closed_qa"}
    (tmp_path / "dolly.jsonl").write_text(json.dumps(dolly) + "\n")
    assert outcomes(tmp_path / "dolly.jsonl")[0].startswith("no_answer: output is missing; the record has category, c")
    columns = {"user": "{instruction}[\n\n{context}]", "assistant": "response"}
    assert outcomes(tmp_path / "dolly.jsonl", columns) == ["London"]
    orca = [
        {"id": n, "system_prompt": s, "question": "2+2?", "response": "4"}
        for n, s in enumerate(["", "Be terse.", None])
    ]
    (tmp_path / "orca.jsonl").write_text("".join(json.dumps(record) + "\n" for record in orca))
    columns = {"system": "system_prompt", "user": "question", "assistant": "response"}
    assert outcomes(tmp_path / "orca.jsonl", columns) == ["4"] * 3


def test_turns_with_different_keys_are_read_from_the_json_columns_of_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    turns = [
        USER,
        {"role": "assistant", "content": "x", "train": False},
        {"role": "tool", "name": "f", "content": "1"},
        ANSWER,
    ]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (chunk,) = [c for shard in list_shards(f"hf:{tmp_path}/set") for c in cut_shard(shard, 0, 1 << 20)]
    assert chunk.path.endswith(".parquet")
    assert outcomes(Path(chunk.uri)) == ["a"]
    texts = pa.array([[json.dumps(turn) for turn in turns]], pa.list_(pa.string()))
    lists = pa.ListArray.from_arrays(texts.offsets, pa.ExtensionArray.from_storage(pa.json_(), texts.values))
    pq.write_table(pa.table({"messages": lists}), tmp_path / "json.parquet")
    assert outcomes(tmp_path / "json.parquet") == ["a"]


def test_a_flag_that_parquet_fills_in_with_null_is_absent(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "train": None}, {**ANSWER, "train": True}], "tools": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert outcomes(tmp_path) == ["a"]


def test_an_odd_column_that_nobody_uses_does_no_harm_and_a_column_twice_is_named(tmp_path: Path) -> None:
    columns = {"prompt": ["q"], "completion": ["a"], "created": pa.array([10**17], pa.timestamp("ms"))}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    assert outcomes(tmp_path) == ["a"]
    twice = pa.Table.from_arrays([pa.array([text]) for text in "qab"], ["prompt", "completion", "completion"])
    pq.write_table(twice, tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet has the column 'completion' twice; rename one of them"):
        outcomes(tmp_path)


def test_a_table_without_a_named_column_lists_those_that_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), tmp_path / "data.parquet")
    assert outcomes(tmp_path, {"user": "{question}[{context}]", "assistant": "answer"}) == ["a"]
    with pytest.raises(DataError, match=r"data\.parquet has no column 'reply'; it has question, answer"):
        outcomes(tmp_path, {"user": "question", "assistant": "reply"})


def test_records_after_an_open_quote_are_not_part_of_an_answer(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('prompt,completion\nq1,a1\nq2,"a2 is 5 feet 3""\nq3,a3\nq4,a4\n')
    with pytest.raises(DataError, match=r"data\.csv, the row that begins in line 3: a quote is not closed"):
        outcomes(tmp_path)
