"""/v1/responses under OpenAI's official client: text, tools, reasoning, streams, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from ftray.chat import Message
from tests.scripted_engine import ScriptedEngine
from tests.unit.test_serve_tools import NOW, RIO, TOOLS, calling, with_client, written

RESPONSE_TOOLS: list[Any] = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]


def respond(engine: ScriptedEngine, **body: Any) -> Any:
    """The response, after checking that the stream of the same answer builds the same one."""

    async def work(client: openai.AsyncOpenAI, _: ScriptedEngine) -> Any:
        texts = list(engine.texts)
        whole = await client.responses.create(model="m", **body)
        engine.texts = texts
        kinds: list[str] = []
        async with client.responses.stream(model="m", **body) as stream:
            async for event in stream:
                kinds.append(event.type)
                assert event.sequence_number == len(kinds) - 1
                final = getattr(event, "response", None)
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == f"response.{whole.status}"
        assert [plain(item) for item in final.output] == [plain(item) for item in whole.output]
        assert final.usage == whole.usage
        return whole

    return with_client(engine, work)


def plain(item: Any) -> Any:
    """An item without ids and the client's own fields."""
    kept = item.model_dump(exclude={"id", "call_id", "parsed_arguments"}, exclude_none=True)
    for part in kept.get("content", []):
        part.pop("parsed", None)
    return kept


def test_a_text_is_a_message() -> None:
    engine, _ = written("hermes", Message("assistant", "Hello there."))
    response = respond(engine, input="Hi", instructions="Be kind.", max_output_tokens=50, temperature=0)
    assert (response.output_text, response.status, response.instructions) == ("Hello there.", "completed", "Be kind.")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert engine.params[0].max_tokens == 50
    prompt = engine.tokenizer.decode(engine.prompts[0])
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    engine, _ = written("hermes", Message("assistant", "Hello there."))
    response = respond(engine, input="Hi", max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_reasoning_and_calls_are_items_and_come_back_as_one_turn() -> None:
    engine, _ = written("qwen3", calling(RIO, NOW, content="Let me look.", reasoning="Some\nthoughts."))
    response = respond(engine, input="How is the weather?", tools=RESPONSE_TOOLS)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    thoughts, message, rio, now = response.output
    assert (thoughts.content[0].text, message.content[0].text) == ("Some\nthoughts.", "Let me look.")
    assert [(call.name, json.loads(call.arguments)) for call in (rio, now)] == [
        (RIO.name, RIO.arguments),
        (NOW.name, NOW.arguments),
    ]

    async def go_on(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        history: list[Any] = [{"role": "user", "content": "How is the weather?"}]
        history += [item.model_dump(exclude_none=True) for item in response.output]
        history += [
            {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."} for call in (rio, now)
        ]
        await client.responses.create(model="m", input=history, tools=RESPONSE_TOOLS)

    with_client(engine, go_on)
    prompt = engine.tokenizer.decode(engine.prompts[-1])
    answer = prompt[prompt.index("<think>") : prompt.index("<|im_start|>tool")]
    assert (
        answer
        == f"<think>\nSome\nthoughts.\n</think>\n\n{engine.texts[0].partition('</think>')[2].lstrip()}<|im_end|>\n"
    )
    assert prompt.count("Sunny.") == 2


def test_forced_calls_and_parsed_texts() -> None:
    class Reading(BaseModel):
        degrees: int

    engine, _ = written("hermes", Message("assistant", "No."), calling(NOW), Message("assistant", '{"degrees":5}'))
    choice = {"type": "function", "name": "now"}
    assert respond(engine, input="x", tools=RESPONSE_TOOLS, tool_choice=choice).output[0].name == "now"

    async def parse(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        answer = await client.responses.parse(model="m", input="How warm?", text_format=Reading)
        assert answer.output_parsed == Reading(degrees=5)

    with_client(engine, parse)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 5001}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text"),
        ({"temperature": 3}, "temperature"),
        ({"surprise": 1}, "surprise"),
        (
            {"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "[]"}]},
            "input[0].tool_calls[0].function.arguments",
        ),
    ],
)  # fmt: skip
def test_what_it_does_not_do_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    engine, _ = written("hermes", Message("assistant", "Hello."))

    async def refused(client: openai.AsyncOpenAI, _: ScriptedEngine) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="m", input="Hi", extra_body=change)
        assert caught.value.param == param

    with_client(engine, refused)
    assert engine.prompts == []
