"""Records in the shapes of the sample files of LLaMA-Factory, axolotl and ms-swift (the table in docs/data.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.fuzz_records import TEMPLATE
from ftray.chat import ChatFormat
from ftray.data.examples import Example, Rules, read_examples
from ftray.data.sources import cut_shard, list_shards
from ftray.errors import DataError
from tests import tiny


def chat() -> ChatFormat:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return ChatFormat(tokenizer)


CHAT = chat()
FUNCTION = {"name": "tip", "parameters": {"type": "object", "properties": {"bill": {"type": "number"}}}}
CALL = json.dumps({"name": "tip", "arguments": {"bill": 50}})
CALL_TEXT = '<call>tip {"bill": 50}</call>'
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
QA = {"user": "question", "assistant": "answer"}

SAMPLES: dict[str, tuple[dict[str, Any], dict[str, str] | None, str]] = {
    "LLaMA-Factory alpaca_en_demo": ({"instruction": "q", "input": "", "output": "a"}, None, "a|"),
    "LLaMA-Factory alpaca with history": (
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["x", "y"]]},
        None,
        "y|a|",
    ),
    "LLaMA-Factory glaive_toolcall_en_demo": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": '{"tip": 7.5}'},
                GPT,
            ],
            "tools": json.dumps([FUNCTION]),
        },
        None,
        f"{CALL_TEXT}|a|",
    ),
    "LLaMA-Factory c4_demo": ({"text": "t", "timestamp": "2019", "url": "u"}, None, "t|"),
    "LLaMA-Factory dpo_en_demo": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT},
        None,
        "unused_key:chosen",
    ),
    "LLaMA-Factory kto_en_demo": ({"messages": [USER, ANSWER], "label": True}, None, "unused_key:label"),
    "LLaMA-Factory v1_sft_demo": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "a"}], "loss_weight": 1.0},
            ]
        },
        None,
        "a|",
    ),
    "LLaMA-Factory reason_tool_use_demo_50": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "r"}, {"type": "tool_call", "value": CALL}],
                },
                {"role": "tool", "content": [{"type": "text", "value": "7.5"}]},
                {"role": "assistant", "content": [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"}]},
            ],
            "tools": json.dumps([FUNCTION]),
        },
        None,
        f"<think>r</think>{CALL_TEXT}|<think>r</think>a|",
    ),
    "LLaMA-Factory mllm_demo": ({"messages": [USER, ANSWER], "images": ["1.jpg"]}, None, "unused_key:images"),
    "LLaMA-Factory mllm_video_demo": ({"messages": [USER, ANSWER], "videos": ["1.mp4"]}, None, "unused_key:videos"),
    "axolotl chat_template": ({"messages": [USER, ANSWER]}, None, "a|"),
    "axolotl sharegpt": ({"conversations": [HUMAN, GPT]}, None, "a|"),
    "axolotl training flag": ({"messages": [USER, {**ANSWER, "training": False}, USER, ANSWER]}, None, "a|"),
    "axolotl train_detail": ({"messages": [USER, {**ANSWER, "train_detail": [{"train": False}]}]}, None, "bad_turn"),
    "axolotl tools": (
        {
            "tools": [{"type": "function", "function": FUNCTION}],
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"type": "function", "function": json.loads(CALL)}]},
            ],
        },
        None,
        f"{CALL_TEXT}|",
    ),
    "axolotl completion": ({"text": "t"}, None, "t|"),
    "axolotl input_output": ({"segments": [{"label": True, "text": "t"}]}, None, "unknown_shape"),
    "axolotl stepwise_supervised": ({"prompt": "q", "completions": ["a"], "labels": [True]}, None, "no_answer"),
    "axolotl chatml.argilla": (
        {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
        None,
        "unused_key:chosen_response",
    ),
    "axolotl load_qa": ({"question": "q", "answer": "a"}, QA, "a|"),
    "axolotl jeopardy": (
        {"question": "q", "category": "c", "answer": "a"},
        {**QA, "user": "{category}: {question}"},
        "a|",
    ),
    "axolotl oasst": ({"INSTRUCTION": "q", "RESPONSE": "a"}, {"user": "INSTRUCTION", "assistant": "RESPONSE"}, "a|"),
    "axolotl gpteacher": (
        {"instruction": "q", "input": "", "response": "a"},
        {"user": "{instruction}[\n\n{input}]", "assistant": "response"},
        "a|",
    ),
    "axolotl summarizetldr": ({"article": "q", "summary": "a"}, {"user": "article", "assistant": "summary"}, "a|"),
    "ms-swift messages with loss": ({"messages": [USER, {**ANSWER, "loss": False}, USER, ANSWER]}, None, "a|"),
    "ms-swift conversation": ({"system": "s", "conversation": [{"human": "q", "assistant": "a"}]}, None, "a|"),
    "ms-swift query": ({"system": "s", "query": "q", "response": "a", "history": [["x", "y"]]}, None, "y|a|"),
    "ms-swift agent": (
        {
            "tools": json.dumps([{"type": "function", "function": FUNCTION}]),
            "messages": [
                USER,
                {"role": "tool_call", "content": CALL},
                {"role": "tool_response", "content": "7.5"},
                ANSWER,
            ],
        },
        None,
        f"{CALL_TEXT}|a|",
    ),
    "ms-swift rlhf": ({"messages": [USER, ANSWER], "rejected_response": "b"}, None, "unused_key:rejected_response"),
    "ms-swift sequence classification": ({"messages": [USER], "label": 1}, None, "unused_key:label"),
    "ms-swift embedding": (
        {"messages": [USER, ANSWER], "negative_messages": [[USER]]},
        None,
        "unused_key:negative_messages",
    ),
    "ms-swift grpo": ({"messages": [USER], "solution": "a"}, None, "no_answer"),
    "ms-swift pretraining": ({"messages": [ANSWER]}, None, "bad_turn"),
    "ms-swift grounding": ({"messages": [USER, ANSWER], "objects": {"ref": ["a"]}}, None, "unused_key:objects"),
}


def outcome(path: Path, columns: dict[str, str] | None) -> str:
    """The trained text of the only record, or the rule that it breaks."""
    rules = Rules(400, "auto", columns, None, None)
    chunks = [c for shard in list_shards(str(path)) for c in cut_shard(shard, 0, 1 << 20)]
    (item,) = [item for chunk in chunks for item in read_examples(chunk, CHAT, rules)]
    if not isinstance(item, Example):
        return item.rule
    on = [int(i) for i, on in zip(item.encoded.input_ids, item.encoded.loss_mask, strict=True) if on]
    return CHAT.decode(on).replace("<|im_end|>", "|")


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_trains_on_its_answers_or_is_rejected_by_name(tmp_path: Path, name: str) -> None:
    record, columns, wanted = SAMPLES[name]
    (tmp_path / "data.json").write_text(json.dumps([record], indent=2))
    assert outcome(tmp_path, columns) == wanted


def test_plain_text_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "wiki_demo.txt").write_text("Some text.\n")
    with pytest.raises(DataError, match=r"contains wiki_demo\.txt, but no \.jsonl, .* file .*; convert the data"):
        list_shards(str(tmp_path))


def test_the_docs_list_each_sample() -> None:
    text = (Path(__file__).parents[2] / "docs/data.md").read_text()
    assert [name for name in SAMPLES if f"| {name} |" not in text] == []
