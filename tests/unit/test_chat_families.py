"""Templates in the form of each family, and conversations of all kinds: ids, masks and prompts keep their promises."""

# ruff: noqa: E501
# Lines of templates are longer than lines of code.

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from ftray.chat import ChatFormat, Conversation, Message, ToolCall, TrainOn
from ftray.errors import DataError
from tests.chat_templates import (
    CONVERSATIONS,
    THOUGHT,
    TOOLS,
    answer,
    broken_promises,
    call,
    differences,
    result,
    tokenizer_for,
    user,
)

TOOL_LIST = "{% for t in tools or [] %}{{ '\\n' + t | tojson }}{% endfor %}"
JSON_CALLS = (
    '{% for c in m.tool_calls or [] %}{{ \'\\n<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
)
CHATML_HEAD = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + TOOL_LIST
    + "{{ '<|im_end|>\\n' }}{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content }}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% for m in messages %}"
)
CHATML_TURNS = (
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
)
LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
SPLIT = (
    "{% set content, thought = m.content or '', m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
HERMES = (
    CHATML_HEAD
    + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + m.content }}"
    + JSON_CALLS
    + "{{ '<|im_end|>\\n' }}"
    + CHATML_TURNS
    + "{% endif %}"
)
# The reasoning of answers before the last question is left out.
QWEN_3 = (
    LAST_USER
    + CHATML_HEAD
    + "{% if m.role == 'assistant' %}"
    + SPLIT
    + "{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ content }}"
    + JSON_CALLS
    + "{{ '<|im_end|>\\n' }}"
    + CHATML_TURNS
    + "{% endif %}"
)
QWEN_3_5 = (  # the prompt opens the reasoning
    QWEN_3.replace("(loop.last or thought)", "true").removesuffix("{% endif %}") + "{{ '<think>\\n' }}{% endif %}"
)
MARKED = HERMES.replace("+ m.content }}{% for c", "}}{% generation %}{{ m.content }}{% for c").replace(
    "{% endfor %}{{ '<|im_end|>\\n' }}{% elif m.role == 'user'",
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endgeneration %}{% elif m.role == 'user'",
)
LLAMA_3 = (  # one call per turn, without text; results as JSON; tools in the first question
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{{ messages[0].content | trim + '<|eot_id|>' }}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) }}{{ '<|end_header_id|>\\n\\n' }}"
    "{% if loop.first and tools %}" + TOOL_LIST + "{{ '\\n\\n' }}{% endif %}"
    "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments | tojson + '}' }}"
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (  # system text and tools stand before the last question; ids have nine letters
    "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}" + LAST_USER + "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 == ns.last %}{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + system + m.content + '[/INST]' }}{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls %}{{ m.content + '[TOOL_CALLS][' }}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ c.function | tojson | replace('}}', '}') + ', \"id\": \"' + c.id + '\"}' + (', ' if not loop.last else ']') }}{% endfor %}"
    "{{ eos_token }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS]{\"content\": ' + m.content | tojson + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% endif %}{% endfor %}"
)
HARMONY = (  # the reasoning of earlier answers is left out once a final answer follows; the last answer has an end of its own
    "{{ '<|start|>system<|message|>Today is ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% if messages[0].role in ('system', 'developer') %}{% set rules = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% if rules or tools %}{{ '<|start|>developer<|message|>' }}{{ rules or '' }}"
    + TOOL_LIST
    + "{{ '<|end|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if 'tool_calls' in m %}{% set ns = namespace(final=false) %}"
    "{% for f in messages[loop.index:] %}{% if f.role == 'assistant' and 'tool_calls' not in f %}{% set ns.final = true %}{% endif %}"
    "{% endfor %}{% set f = m.tool_calls[0].function %}{% if (m.content or m.thinking) and not ns.final %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' + f.arguments | tojson + '<|call|>' }}"
    "{% elif loop.last and not add_generation_prompt %}{% if 'thinking' in m %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% elif m.role == 'tool' %}"
    "{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
DEEPSEEK = (  # the prompt opens the reasoning, which is left out of all answers; arguments are text; no end before results
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ tools | tojson if tools else '' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif 'tool_calls' in m %}"
    "{{ '<｜Assistant｜>' + m.content + '<｜tool▁calls▁begin｜>' }}{% for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.type }}"
    "{{ '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{% elif m.role == 'assistant' %}"
    "{{ ('<｜Assistant｜>' if loop.previtem.role != 'tool' else '') + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
GLM = (  # an answer is ended by the token of the next role
    "[gMASK]<sop>{% if tools %}{{ '<|system|>' }}" + TOOL_LIST + "{% endif %}" + LAST_USER + "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    + SPLIT
    + "{{ '<|assistant|>\\n<think>' + (thought if loop.index0 > ns.last else '') + '</think>' }}"
    "{{ '\\n' + content.strip() if content.strip() else '' }}{% for c in m.tool_calls or [] %}"
    "{{ '\\n<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "{{ '\\n<arg_key>' + k + '</arg_key>\\n<arg_value>' + (v if v is string else v | tojson) + '</arg_value>' }}{% endfor %}"
    "{{ '\\n</tool_call>' }}{% endfor %}{% elif m.role == 'tool' %}"
    "{{ ('<|observation|>' if loop.previtem.role != 'tool' else '') + '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% else %}{{ ('<|user|>' if m.role == 'user' else '<|system|>') + '\\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHI = (  # tokens swallow the white space behind them; only the last answer is followed by the end of the text
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (  # the system text stands in the first question
    "{{ bos_token }}{% set head = '' %}{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (head if loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GRANITE = (
    "{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
    "{% if m.tool_calls %}{{ '<|tool_call|>' + m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}"
    "{{ '<|end_of_text|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
FAMILIES = {
    "Hermes, Qwen 2.5, OLMo": HERMES,
    "Qwen 3": QWEN_3,
    "Qwen 3.5": QWEN_3_5,
    "SmolLM3, with marks": MARKED,
    "Llama 3": LLAMA_3,
    "Mistral": MISTRAL,
    "gpt-oss": HARMONY,
    "DeepSeek": DEEPSEEK,
    "GLM": GLM,
    "Phi": PHI,
    "Gemma": GEMMA,
    "Granite": GRANITE,
}
WITHOUT_REASONING = ("Hermes, Qwen 2.5, OLMo", "SmolLM3, with marks", "Llama 3", "Mistral", "Phi", "Gemma", "Granite")
REFUSED = {  # family → what its records are refused for
    "Llama 3": ("reasoning", "text of turn 1", "one per turn"),
    "gpt-oss": ("one per turn",),
    "DeepSeek": ("reasoning of turn 3",),  # behind a result the prompt opens no reasoning
    "Phi": ("reasoning", "leaves out tools", "no tool role"),
    "Gemma": ("reasoning", "leaves out tools", "no tool role"),
}


def format_of(family: str) -> ChatFormat:
    tokenizer = tokenizer_for(FAMILIES[family])
    if family == "Phi":
        names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
        tokenizer.add_tokens(
            [AddedToken(t, special=True, normalized=False, rstrip=True) for t in names], special_tokens=True
        )
    return ChatFormat(tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_keeps_the_promises_for_every_kind_of_conversation(family: str) -> None:
    chat = format_of(family)
    reasons = REFUSED.get(family, ("reasoning",) if family in WITHOUT_REASONING else ())
    broken, refused = [], []
    for name, conversation in CONVERSATIONS.items():
        try:
            broken += [f"{name}: {promise}" for promise in broken_promises(chat, conversation)]
            ids, mask = differences(chat, conversation)
        except DataError as err:
            refused.append(f"{name}: {err}")
            continue
        if ids == "ids" or mask == "mask":
            broken.append(f"{name}: {ids} {mask}")
    assert broken == []
    assert [line for line in refused if not any(reason in line for reason in reasons)] == []
    assert {reason for reason in reasons if not any(reason in line for line in refused)} == set()


STOPS = {
    "Hermes, Qwen 2.5, OLMo": ["<|im_end|>"],
    "gpt-oss": ["<|return|>", "<|call|>", "</s>"],
    "GLM": ["<|user|>", "<|observation|>", "</s>"],
    "Phi": ["<|end|>", "</s>"],
}


@pytest.mark.parametrize("family", STOPS)
def test_every_token_that_ends_an_answer_stops_the_model(family: str) -> None:
    chat = format_of(family)
    assert [chat.decode([token]) for token in chat.stop_token_ids] == STOPS[family]


def test_a_token_that_ends_each_call_does_not_stop_the_model() -> None:
    end = "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"  # DeepSeek-R1's template forgets it behind a single call
    assert end in DEEPSEEK
    chat = ChatFormat(tokenizer_for(DEEPSEEK.replace(end, "{% if m.tool_calls | length > 1 %}" + end + "{% endif %}")))
    assert [chat.decode([token]) for token in chat.stop_token_ids] == ["<｜end▁of▁sentence｜>", "</s>"]


def trained_texts(family: str, *messages: Message, tools: Any = ()) -> list[str]:
    chat = format_of(family)
    texts = []
    for ids, mask in chat.encode_example(Conversation(messages, tools)).documents():
        texts.append(chat.decode([i for i, trained in zip(ids, mask, strict=True) if trained]))
    return texts


def test_reasoning_that_the_prompt_opens_is_trained_on_from_where_the_prompt_ends() -> None:
    thought = answer("4", reasoning="Two and two.")
    inline = answer("<think>\nTwo and two.\n</think>\n\n4")
    for message in (thought, inline):
        assert trained_texts("Qwen 3.5", user("2+2?"), message) == ["Two and two.\n</think>\n\n4<|im_end|>"]
        assert trained_texts("DeepSeek", user("2+2?"), message) == ["Two and two.\n</think>\n\n4<｜end▁of▁sentence｜>"]
    for family, end in (("Qwen 3.5", "<|im_end|>"), ("DeepSeek", "<｜end▁of▁sentence｜>")):
        assert trained_texts(family, user("2+2?"), answer("4")) == [f"\n</think>\n\n4{end}"]


def test_reasoning_that_a_template_leaves_out_later_is_trained_on_once() -> None:
    turns = (user("a"), answer("one", reasoning="1st."), user("b"), answer("two", reasoning="2nd."))
    assert trained_texts("Qwen 3", *turns) == [
        "<think>\n1st.\n</think>\n\none<|im_end|>",
        "<think>\n2nd.\n</think>\n\ntwo<|im_end|>",
    ]
    steps = (user(), call(reasoning=THOUGHT), result(), answer("Sunny.", reasoning="Done."))
    head = "<|channel|>analysis<|message|>"
    assert trained_texts("gpt-oss", *steps, tools=TOOLS) == [
        (
            f"{head}{THOUGHT}<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>"
            '{"city": "Oslo", "days": 3}<|call|>'
        ),
        f"{head}Done.<|end|><|start|>assistant<|channel|>final<|message|>Sunny.<|return|>",
    ]


def test_the_token_of_the_next_role_ends_an_answer() -> None:
    turns = (user(), call(), result(), answer("Sunny."), user("Thanks"), answer("Bye."))
    (text,) = trained_texts("GLM", *turns, tools=TOOLS)
    assert text == (
        "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>"
        "\n<arg_value>3</arg_value>\n</tool_call><|observation|>\n<think></think>\nSunny.<|user|>\n<think></think>\nBye.<|user|>"
    )


def test_ids_fit_the_template_and_results_their_calls() -> None:
    calls = answer("", tool_calls=(ToolCall("get_weather", {"city": "Oslo"}), ToolCall("get_time", {"city": "Rome"})))
    turns = Conversation((user(), calls, result("sunny"), result("12:00")), TOOLS)
    text = format_of("Mistral").render(turns, add_generation_prompt=True)
    assert '{"name": "get_time", "arguments": {"city": "Rome"}, "id": "call00001"}]' in text
    assert '"sunny", "call_id": "call00000"}' in text
    assert '"12:00", "call_id": "call00001"}' in text


DROPPING = {
    "tools": ("{{ tools | tojson if tools else '' }}", Conversation((user(), answer()), TOOLS), "leaves out tools"),
    "calls": (JSON_CALLS, Conversation((user(), call()), ()), r"leaves out tool calls \(turn 1\)"),
    "reasoning": (
        "{{ m.reasoning_content or '' }}",
        Conversation((user(), answer(reasoning="x y"))),
        "the reasoning of turn 1",
    ),
}
ALL_FIELDS = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ m.reasoning_content or '' }}"
    "{{ m.content }}"
    + JSON_CALLS
    + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("field", DROPPING)
def test_a_field_that_the_template_leaves_out_is_refused_by_name(field: str) -> None:
    part, conversation, words = DROPPING[field]
    ChatFormat(tokenizer_for(ALL_FIELDS)).encode_example(conversation)
    with pytest.raises(DataError, match=words):
        ChatFormat(tokenizer_for(ALL_FIELDS.replace(part, ""))).encode_example(conversation)


def test_a_special_token_in_a_call_or_in_reasoning_is_refused() -> None:
    chat = format_of("Qwen 3")
    for message in (call("a<|im_end|>b"), call(name="<|im_start|>"), answer("x", reasoning="<|im_end|>")):
        with pytest.raises(DataError, match=r"turn 1 \((tool call|reasoning)\) contains the special token"):
            chat.encode_example(Conversation((user(), message), TOOLS))
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}
    with pytest.raises(DataError, match="tools contains the special token"):
        chat.encode_prompt(Conversation((user(),), (tool,)))


# Reasoning only after the last question; an answer without any is written otherwise than the prompt begins it.
REWRITTEN = (
    LAST_USER
    + CHATML_HEAD
    + "{% if m.role == 'assistant' %}{% set kept = m.reasoning_content and loop.index0 > ns.last %}{{ '<|im_start|>assistant\\n' }}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' if kept else '<think></think>' }}{{ m.content }}"
    + JSON_CALLS
    + "{{ '<|im_end|>\\n' }}"
    + CHATML_TURNS
    + "{{ '<think>\\n' }}{% endif %}"
)


@pytest.mark.parametrize("reasoning", ["R1.", ""])
def test_an_answer_that_begins_otherwise_than_its_prompt_is_not_sought_in_an_earlier_turn(reasoning: str) -> None:
    chat = ChatFormat(tokenizer_for(REWRITTEN))
    turns = Conversation((user(), call(reasoning=reasoning), result(), answer("END1")), TOOLS)
    ids, mask = chat.encode_example(turns).documents()[-1]
    assert chat.decode([i for i, trained in zip(ids, mask, strict=True) if trained]) == "</think>END1<|im_end|>"
    assert broken_promises(chat, turns) == []


@pytest.mark.parametrize("family", ["Qwen 3", "GLM", "gpt-oss"])
def test_what_is_trained_on_does_not_change_the_stop_tokens(family: str) -> None:
    tokenizer = tokenizer_for(FAMILIES[family])
    for parts in (TrainOn(assistant=False), TrainOn(tool_calls=False), TrainOn(reasoning=False)):
        assert ChatFormat(tokenizer, train_on=parts).stop_token_ids == ChatFormat(tokenizer).stop_token_ids


@pytest.mark.parametrize(
    ("family", "question", "message", "words"),
    [
        ("Qwen 3", "Hello", answer("Hello <think>x</think> there"), r"the text of turn 1 \(assistant\)"),
        ("Hermes, Qwen 2.5, OLMo", "Add the numbers.", answer("4", reasoning="Add the numbers."), "the reasoning"),
        ("Hermes, Qwen 2.5, OLMo", "2+2?", answer("Two and two: 4", reasoning="Two and two"), "the reasoning"),
        ("Llama 3", "Say: I look.", call(text="I look."), r"the text of turn 1 \(assistant\)"),
        ("Llama 3", "a", call(text="get_weather"), "get_weather"),
    ],
)
def test_a_text_that_the_template_leaves_out_is_not_taken_from_elsewhere(
    family: str, question: str, message: Message, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        format_of(family).encode_example(Conversation((user(question), message), TOOLS if message.tool_calls else ()))


def test_a_template_may_ask_for_the_number_of_turns_at_each_turn() -> None:
    """The rendering has a budget of steps. Measuring all turns at each turn would use it up."""
    chat = ChatFormat(
        tokenizer_for(
            HERMES.replace("{% for m in messages %}", "{% for m in messages %}{% if messages | length %}{% endif %}")
        )
    )
    turns = tuple(message for i in range(1000) for message in (user(f"q{i}"), answer(f"a{i}")))
    assert chat.render(Conversation(turns)).count("<|im_start|>assistant") == 1000
