"""What is trained on is what `data.train_on` selects, and nothing else; ids do not depend on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ftray import config
from ftray.chat import ChatFormat, Conversation, Message, ToolCall, TrainOn
from ftray.errors import DataError
from tests import tiny

END = "<|im_end|>"
# Qwen3's form: reasoning of the answers after the last question, calls as JSON in tags.
TEMPLATE = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    '{{ m.content }}{% for c in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
REASONING = "<think>\nWhere is it?\n</think>\n\n"
CALL = '\n<tool_call>\n{"name": "look", "arguments": {"at": "é 🙂"}}\n</tool_call>'
CONVERSATION = Conversation(
    (
        Message("user", "Find it."),
        Message("assistant", "I look.", reasoning="Where is it?", tool_calls=(ToolCall("look", {"at": "é 🙂"}),)),
        Message("tool", "here"),
        Message("assistant", "It is here.", reasoning="Now I know."),
    ),
    (TOOL,),
)


def chat_with(**train_on: bool) -> ChatFormat:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return ChatFormat(tokenizer, train_on=TrainOn(**train_on))


def trained(chat: ChatFormat, conversation: Conversation) -> list[str]:
    encoded = chat.encode_example(conversation)
    (batch,) = chat.encode_examples([conversation])
    assert not isinstance(batch, DataError)
    assert list(batch.loss_mask) == encoded.loss_mask
    ids, mask = encoded.input_ids, encoded.loss_mask
    edges = [i for i in range(len(ids) + 1) if (i < len(ids) and mask[i]) != (i > 0 and mask[i - 1])]
    return [chat.decode(ids[a:b], before=ids[:a]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


LAST = "<think>\nNow I know.\n</think>\n\n"


@pytest.mark.parametrize(
    ("train_on", "parts"),
    [
        ({}, [f"{REASONING}I look.{CALL}{END}", f"{LAST}It is here.{END}"]),
        ({"reasoning": False}, [f"I look.{CALL}{END}", f"It is here.{END}"]),
        ({"tool_calls": False}, [f"{REASONING}I look.", END, f"{LAST}It is here.{END}"]),
        ({"assistant": False}, [REASONING, CALL + END, LAST, END]),
        ({"assistant": False, "reasoning": False}, [CALL + END]),
        ({"assistant": False, "tool_calls": False}, [REASONING, END, LAST, END]),
        ({"last_turn_only": True}, [f"{LAST}It is here.{END}"]),
        ({"last_turn_only": True, "reasoning": False}, [f"It is here.{END}"]),
    ],
)
def test_the_selected_parts_and_the_end_token_are_trained_on(train_on: dict[str, Any], parts: list[str]) -> None:
    chat = chat_with(**train_on)
    assert trained(chat, CONVERSATION) == parts
    assert chat.encode_example(CONVERSATION).input_ids == chat_with().encode_example(CONVERSATION).input_ids


def test_reasoning_written_into_the_text_is_reasoning() -> None:
    conversation = Conversation((Message("user", "2+2?"), Message("assistant", "<think>\ntwo and two\n</think>\n\n4")))
    assert trained(chat_with(reasoning=False), conversation) == [f"4{END}"]
    assert trained(chat_with(assistant=False), conversation) == ["<think>\ntwo and two\n</think>\n\n", END]


@pytest.mark.parametrize("text", ["look 🙂", "naïve é", "🙂", "看 \ufffd"])
def test_a_part_may_end_in_a_character_of_several_tokens(text: str) -> None:
    calls = Message("assistant", text, reasoning=f"so {text}", tool_calls=(ToolCall("look", {"at": "x"}),))
    conversation = Conversation((Message("user", "a"), calls), (TOOL,))
    assert trained(chat_with(tool_calls=False, reasoning=False), conversation) == [text, END]
    assert trained(chat_with(tool_calls=False), conversation) == [f"<think>\nso {text}\n</think>\n\n{text}", END]
    call = '\n<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
    assert trained(chat_with(assistant=False, reasoning=False), conversation) == [call + END]


@pytest.mark.parametrize("text", ["think", "i", "in", "k", "look", "final", "name", ">"])
@pytest.mark.parametrize("is_inline", [False, True])
def test_a_part_that_also_stands_in_the_templates_own_text_is_found_at_its_place(text: str, is_inline: bool) -> None:
    head = f"<think>\n{text}\n</think>\n\n"
    message = Message("assistant", head + text) if is_inline else Message("assistant", text, reasoning=text)
    conversation = Conversation((Message("user", "a"), message))
    assert trained(chat_with(reasoning=False), conversation) == [text + END]
    assert trained(chat_with(assistant=False), conversation) == [head, END]
    call = '\n<tool_call>\n{"name": "' + text + '", "arguments": {"at": "x"}}\n</tool_call>'
    called = replace(conversation.messages[1], tool_calls=(ToolCall(text, {"at": "x"}),))
    conversation = Conversation((Message("user", "a"), called), (TOOL,))
    assert trained(chat_with(assistant=False), conversation) == [head, call + END]
    assert trained(chat_with(tool_calls=False), conversation) == [head + text, END]
    silent = replace(called, content=head if is_inline else "")
    conversation = Conversation((Message("user", "a"), silent), (TOOL,))
    calls = (head + call) if not is_inline else trained(chat_with(), conversation)[0].removesuffix(END)
    assert trained(chat_with(tool_calls=False), conversation) == [calls.removesuffix(call), END]
    assert trained(chat_with(reasoning=False), conversation) == [call + END]


def test_blank_reasoning_is_nothing_to_train_on() -> None:
    for message in (Message("assistant", "b", reasoning=" "), Message("assistant", "<think>\n\n</think>\n\nb")):
        with pytest.raises(DataError, match="no assistant turn to train on"):
            chat_with(assistant=False).encode_example(Conversation((Message("user", "a"), message)))


def test_a_conversation_without_a_selected_part_has_nothing_to_train_on() -> None:
    plain = Conversation((Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(DataError, match="no assistant turn to train on"):
        chat_with(assistant=False).encode_example(plain)
    unanswered = replace(CONVERSATION, messages=(*CONVERSATION.messages[:3], Message("assistant", "b", train=False)))
    with pytest.raises(DataError, match="no assistant turn to train on"):
        chat_with(last_turn_only=True).encode_example(unanswered)


def test_training_on_nothing_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="all false, so nothing is trained on"):
        config.DataConfig.model_validate(
            {"train": [{"path": "x"}], "train_on": {"assistant": False, "reasoning": False, "tool_calls": False}}
        )
