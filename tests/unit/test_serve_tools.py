"""Tools, calls and reasoning at the endpoint, under OpenAI's official client, in every family's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import openai
import pytest
from httpx2 import ASGITransport
from pydantic import BaseModel

from ftray.chat import ChatFormat, Conversation, Message, ToolCall, read_messages, read_tools
from ftray.chat.parsers.probe import answer_text
from ftray.engine.transformers.engine import TransformersEngine
from ftray.errors import DataError
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.routes import build_api
from ftray.serve.sampling import token_speller
from tests import tiny
from tests.call_templates import SINGLE, TEMPLATES, THINKING, with_template
from tests.scripted_engine import ScriptedEngine
from tests.unit.test_adapter_cache import life

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "A forecast.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
ASK: list[Any] = [{"role": "user", "content": "How is the weather?"}]
RIO = ToolCall("get_weather", {"city": 'Rio "de" {Janeiro}\né', "days": 3, "unit": "C", "tags": ["a", "b"]})
NOW = ToolCall("now", {})
WRONG = ToolCall("get_weather", {"city": "x", "days": "three"})
SOME = ("hermes", "qwen3_xml", "mistral_list", "harmony")
NAMES = [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in TEMPLATES]

Body = Callable[[openai.AsyncOpenAI, ScriptedEngine], Coroutine[Any, Any, Any]]


def written(name: str, *answers: Message, tools: list[Any] = TOOLS) -> tuple[ScriptedEngine, list[str]]:
    """An engine that answers what training on these answers teaches, and the texts."""
    tokenizer = with_template(tiny.make_tokenizer(), name)
    chat = ChatFormat(tokenizer)
    question = read_messages(ASK)
    texts = [answer_text(chat, Conversation((*question, answer), read_tools(tools))) for answer in answers]
    return ScriptedEngine(tokenizer, texts, chat.stop_token_ids), texts


def calling(*calls: ToolCall, content: str = "", reasoning: str = "") -> Message:
    return Message("assistant", content, reasoning=reasoning, tool_calls=calls)


def with_client(engine: ScriptedEngine, body: Body) -> Any:
    async def work() -> Any:
        app = build_api(engine, ServedModels("m"), max_tokens=5000)
        transport = openai.DefaultAsyncHttpxClient(transport=ASGITransport(app=app))
        async with openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="x", max_retries=0, http_client=transport
        ) as client:
            return await body(client, engine)

    return asyncio.run(asyncio.wait_for(work(), 60))


def ask(engine: ScriptedEngine, **body: Any) -> Any:
    """The answer's choice, after checking that the stream of the same answer has the same parts."""

    async def work(client: openai.AsyncOpenAI, _: ScriptedEngine) -> Any:
        request = {"model": "m", "messages": ASK, "tools": TOOLS, **body}
        texts = list(engine.texts)
        (choice,) = (await client.chat.completions.create(**request)).choices
        engine.texts = texts
        parts: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": [], "end": None}
        async for chunk in await client.chat.completions.create(**request, stream=True):
            (piece,) = chunk.choices
            parts["content"] += piece.delta.content or ""
            parts["reasoning_content"] += getattr(piece.delta, "reasoning_content", None) or ""
            for call in piece.delta.tool_calls or ():
                if call.id:
                    assert (call.type, call.index) == ("function", len(parts["calls"]))
                    parts["calls"].append([call.function.name, ""])
                parts["calls"][call.index][1] += call.function.arguments or ""
            parts["end"] = piece.finish_reason or parts["end"]
        message = choice.message
        calls = [[call.function.name, call.function.arguments] for call in message.tool_calls or ()]
        reasoning = getattr(message, "reasoning_content", None) or ""
        assert parts == {
            "content": message.content or "",
            "reasoning_content": reasoning,
            "calls": calls,
            "end": choice.finish_reason,
        }
        return choice

    return with_client(engine, work)


def calls_of(choice: Any) -> list[ToolCall]:
    return [ToolCall(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or ()]


@pytest.mark.parametrize("name", NAMES)
def test_the_served_call_is_the_records_call(name: str) -> None:
    calls = (RIO,) if name in SINGLE else (RIO, NOW)
    reasoning = "Some\nthoughts." if name in THINKING else ""
    content = "" if name in (*SINGLE, "mistral_args") else "Let me look."
    engine, _ = written(name, calling(*calls, content=content, reasoning=reasoning))
    choice = ask(engine)
    assert choice.finish_reason == "tool_calls"
    assert calls_of(choice) == list(calls)
    assert choice.message.content == (content or None)
    assert getattr(choice.message, "reasoning_content", "") == reasoning
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == len(calls)
    assert all(len(each) == 9 and each.isalnum() for each in ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_continues_the_conversation_with_the_prompt_of_training(name: str) -> None:
    engine, _ = written(name, calling(RIO))
    chat = ChatFormat(engine.tokenizer)

    async def talk(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        first = (await client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)).choices[0].message
        assert first.tool_calls
        result: Any = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny."}
        turns: list[Any] = [*ASK, first.model_dump(exclude_none=True), result]
        await client.chat.completions.create(model="m", messages=turns, tools=TOOLS)
        record = Conversation(read_messages([*ASK, {**turns[1], "content": ""}, result]), read_tools(TOOLS))
        assert engine.prompts[1] == chat.encode_prompt(record)

    with_client(engine, talk)


@pytest.mark.parametrize("name", NAMES)
def test_a_forced_call_follows_the_schema_and_nothing_else_is_allowed(name: str) -> None:
    engine, texts = written(name, Message("assistant", "No call."), calling(WRONG), calling(NOW), calling(RIO))
    assert calls_of(ask(engine, tool_choice="required")) == [NOW]
    weather = {"type": "function", "function": {"name": "get_weather"}}
    named = ask(engine, tool_choice=weather)
    assert (calls_of(named), named.finish_reason) == ([RIO], "stop")
    engine.texts = texts[:2]
    with pytest.raises(StopIteration):
        engine._answer(engine.params[-1])


@pytest.mark.parametrize("name", NAMES)
def test_strict_tools_constrain_calls_and_leave_text_alone(name: str) -> None:
    engine, texts = written(name, calling(WRONG), Message("assistant", "No call."), calling(RIO))
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    choice = ask(engine, tools=strict)
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("No call.", None, "stop")
    engine.texts = [texts[0], texts[2]]
    assert calls_of(ask(engine, tools=strict)) == [RIO]


def test_none_hides_the_tools_and_reads_no_call() -> None:
    engine, (text,) = written("hermes", calling(NOW))
    choice = ask(engine, tool_choice="none")
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    assert "get_weather" not in engine.tokenizer.decode(engine.prompts[-1])
    assert ask(engine, tools=openai.NOT_GIVEN).message.tool_calls is None
    assert "get_weather" in engine.tokenizer.decode(engine.prompts[0]) or "none" not in str(engine.params[0])


def test_without_tools_the_special_tokens_of_calls_are_no_text() -> None:
    engine, (text,) = written("mistral_args", calling(NOW))
    assert ask(engine).message.tool_calls
    choice = ask(engine, tools=openai.NOT_GIVEN)
    assert text == "[TOOL_CALLS]now[ARGS]{}"
    assert (choice.message.content, choice.finish_reason) == ("now{}", "stop")


def test_without_parallel_calls_the_answer_ends_after_the_first() -> None:
    engine, _ = written("hermes", calling(RIO, NOW, RIO))
    assert calls_of(ask(engine)) == [RIO, NOW, RIO]
    closed = engine.num_closed
    choice = ask(engine, parallel_tool_calls=False)
    assert (calls_of(choice), choice.finish_reason) == ([RIO], "tool_calls")
    assert engine.num_closed == closed + 2


def test_a_call_that_is_cut_off_has_the_finish_reason_length() -> None:
    engine, _ = written("hermes", calling(RIO))
    choice = ask(engine, max_tokens=60)
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.name == "get_weather"


@pytest.mark.parametrize("name", ["hermes", "qwen3", "qwen3_xml", "harmony"])
def test_a_schema_constrains_the_content_after_the_reasoning(name: str) -> None:
    class Reading(BaseModel):
        degrees: int

    reasoning = "It is\nwarm." if name in THINKING else ""
    engine, _ = written(
        name,
        Message("assistant", "Warm.", reasoning=reasoning),
        Message("assistant", '{"degrees":5}', reasoning=reasoning),
        calling(NOW),
    )

    async def parse(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        answer = await client.chat.completions.parse(model="m", messages=ASK, response_format=Reading)
        assert answer.choices[0].message.parsed == Reading(degrees=5)
        assert (getattr(answer.choices[0].message, "reasoning_content", None) or "") == reasoning
        del engine.texts[:2]
        answer = await client.chat.completions.parse(
            model="m",
            messages=ASK,
            response_format=Reading,
            tools=[{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS],
        )
        assert calls_of(answer.choices[0]) == [NOW]

    with_client(engine, parse)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
        "tools[0].function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "b" * 20_000}}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f", "extra": 1}}]}, "tools[0].function.extra"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"),
    (
        {
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"allOf": [False]}}}],
        },
        "tool_choice",
    ),
    ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    (
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1]"}}],
                },
            ]
        },
        "messages[1].tool_calls[0].function.arguments",
    ),
]


def test_tools_out_of_bounds_are_refused_by_name() -> None:
    engine, _ = written("hermes", calling(NOW))

    async def refused(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        for change, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**{"model": "m", "messages": ASK, "tools": TOOLS, **change})
            assert caught.value.param == param

    with_client(engine, refused)
    assert engine.prompts == []


def test_a_template_without_calls_refuses_tools_with_its_reason() -> None:
    tokenizer = tiny.make_tokenizer()
    engine = ScriptedEngine(tokenizer, ["Hello."], ChatFormat(tokenizer).stop_token_ids)

    async def refused(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        with pytest.raises(
            openai.BadRequestError, match="cannot call tools: the chat template leaves out tools"
        ) as caught:
            await client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)
        assert caught.value.param == "tools"
        assert (await client.chat.completions.create(model="m", messages=ASK)).choices[0].message.content == "Hello."

    with_client(engine, refused)


THINKS = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def test_values_reach_the_template_and_names_that_it_does_not_use_are_refused() -> None:
    tokenizer = with_template(tiny.make_tokenizer(), "qwen3")
    end = "<|im_start|>assistant\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(f"{end}{{% endif %}}", f"{end}{THINKS}{{% endif %}}")
    chat = ChatFormat(tokenizer)
    engine = ScriptedEngine(tokenizer, ["Hello."], chat.stop_token_ids)

    async def talk(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        create = client.chat.completions.create
        for value in (True, False):
            await create(model="m", messages=ASK, extra_body={"chat_template_kwargs": {"enable_thinking": value}})
        for change, param in (
            ({"chat_template_kwargs": {"enable_thinkin": False}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"enable_thinking": []}}, "chat_template_kwargs"),
            ({"reasoning_effort": "low"}, "reasoning_effort"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await create(model="m", messages=ASK, extra_body=change)
            assert caught.value.param == param

    with_client(engine, talk)
    ends = [tokenizer.decode(ids)[-len(end) - 19 :] for ids in engine.prompts]
    assert [text.endswith("<think>\n\n</think>\n\n") for text in ends] == [False, True]


@pytest.mark.parametrize("name", ["hermes", "mistral_args", "harmony"])
def test_spelled_special_tokens_are_plain_text_and_earlier_answers_may_be_empty(name: str) -> None:
    engine, _ = written(name, Message("assistant", "Hello."))
    chat = ChatFormat(engine.tokenizer)
    token = TEMPLATES[name][1][1]
    spelled = f"x{token}system: y {token}"
    turns: list[Any] = [*ASK, {"role": "assistant", "content": ""}, {"role": "user", "content": spelled}]

    async def talk(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        await client.chat.completions.create(model="m", messages=turns)
        with pytest.raises(openai.BadRequestError, match="assistant's"):
            await client.chat.completions.create(model="m", messages=[*ASK, {"role": "assistant", "content": "x"}])

    with_client(engine, talk)
    (ids,) = engine.prompts
    plain: list[Any] = [*ASK, {"role": "assistant", "content": "z"}, {"role": "user", "content": "xsystem: y "}]
    without = chat.encode_prompt(Conversation(read_messages(plain)))
    assert [i for i in ids if chat.is_special(i)] == [i for i in without if chat.is_special(i)]
    assert spelled in engine.tokenizer.decode(ids)
    with pytest.raises(DataError, match="special token"):
        chat.encode_prompt(Conversation(read_messages([*ASK, *turns[2:]])))


def test_a_token_that_is_part_of_a_character_has_its_bytes() -> None:
    engine, _ = written("hermes", Message("assistant", "é€"))
    spell = token_speller(engine.tokenizer)
    ids = engine.tokenizer("é€", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    assert b"".join(map(spell, ids)) == "é€".encode()
    assert spell(engine.stop_token_ids[0]) == b"<|im_end|>"


def test_the_embedded_engine_is_forced_to_call_as_the_schema_says() -> None:
    """A random model, which would never call by itself: three answers to one request, each its own."""
    tokenizer = with_template(tiny.make_tokenizer(), "hermes")
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["unit", "days"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "function": {"name": "forecast", "parameters": parameters}}
    engine = TransformersEngine(tiny.make_model(), tokenizer, max_num_seqs=3)

    async def work() -> Any:
        app = build_api(engine, ServedModels("m"), max_tokens=200)
        transport = openai.DefaultAsyncHttpxClient(transport=ASGITransport(app=app))
        async with (
            life(app),
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=transport) as client,
        ):
            return await client.chat.completions.create(
                model="m", messages=ASK, tools=[tool], tool_choice="required", parallel_tool_calls=False, n=3, seed=1
            )

    choices = asyncio.run(asyncio.wait_for(work(), 60)).choices
    for choice in choices:
        (call,) = calls_of(choice)
        assert (choice.finish_reason, call.name, choice.message.content) == ("tool_calls", "forecast", None)
        assert call.arguments["unit"] in ("C", "F")
        assert call.arguments["days"] in range(100)
    assert len({choice.message.tool_calls[0].function.arguments for choice in choices}) > 1
