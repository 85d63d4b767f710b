"""Client libraries against an endpoint at the address in the first argument. Run by test_client_libraries, in another venv.

Prints one JSON line per case: its name, and its result or error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

URL = sys.argv[1] if len(sys.argv) > 1 else ""
WEATHER, USER = "How is the weather?", "Ada is 36"


class User(BaseModel):
    name: str
    age: int


def get_weather(city: str) -> str:
    """A forecast."""
    return f"Sunny in {city}."


def langchain_agent() -> Any:
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    agent = create_agent(ChatOpenAI(model="m", base_url=URL, api_key="x"), [get_weather])
    turns = agent.invoke({"messages": [("user", WEATHER)]})["messages"]
    return [turn.type for turn in turns], turns[1].tool_calls[0]["args"], turns[-1].content


def langchain_stream() -> Any:
    from langchain_openai import ChatOpenAI

    first, *rest = ChatOpenAI(model="m", base_url=URL, api_key="x").bind_tools([get_weather]).stream(WEATHER)
    for chunk in rest:
        first += chunk
    return first.tool_calls[0]["args"]


def langchain_responses() -> Any:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="m", base_url=URL, api_key="x", use_responses_api=True)
    return model.bind_tools([get_weather]).invoke(WEATHER).tool_calls[0]["args"]


def langchain_structured() -> Any:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="m", base_url=URL, api_key="x")
    ways = ("function_calling", "json_schema")
    return [model.with_structured_output(User, method=way).invoke(USER).model_dump() for way in ways]


def instructor_modes() -> Any:
    import instructor
    import openai

    answers = []
    for mode in ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "RESPONSES_TOOLS"):
        client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="x"), mode=getattr(instructor.Mode, mode))
        turns = [{"role": "user", "content": USER}]
        answer = client.chat.completions.create(model="m", response_model=User, messages=turns, max_retries=0)
        answers.append(answer.model_dump())
    return answers


def litellm_calls() -> Any:
    import litellm

    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    options: dict[str, Any] = {
        "model": "openai/m",
        "api_base": URL,
        "api_key": "x",
        "messages": [{"role": "user", "content": WEATHER}],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}],
    }
    whole = litellm.completion(**options)
    streamed = litellm.stream_chunk_builder(list(litellm.completion(**options, stream=True)))
    return [json.loads(answer.choices[0].message.tool_calls[0].function.arguments) for answer in (whole, streamed)]


def litellm_overflow() -> Any:
    import litellm

    turns = [{"role": "user", "content": "x " * 120_000}]
    try:
        litellm.completion(model="openai/m", api_base=URL, api_key="x", messages=turns)
    except litellm.ContextWindowExceededError:
        return "recognized"
    return "not recognized"


def pydantic_ai_agent() -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=URL, api_key="x")
    models = (OpenAIChatModel("m", provider=provider), OpenAIResponsesModel("m", provider=provider))
    answers = [Agent(model, tools=[get_weather]).run_sync(WEATHER).output for model in models]
    typed = Agent(OpenAIChatModel("m", provider=provider), output_type=User).run_sync(USER).output
    return [*answers, typed.model_dump()]


def llama_index_chat() -> Any:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(model="m", api_base=URL, api_key="x", is_chat_model=True)
    turns = [ChatMessage(role="user", content="Hi")]
    return [model.chat(turns).message.content, "".join(chunk.delta or "" for chunk in model.stream_chat(turns))]


CASES: list[Callable[[], Any]] = [
    langchain_agent,
    langchain_stream,
    langchain_responses,
    langchain_structured,
    instructor_modes,
    litellm_calls,
    litellm_overflow,
    pydantic_ai_agent,
    llama_index_chat,
]

if __name__ == "__main__":
    for case in CASES:
        try:
            result = case()
        except Exception as err:  # noqa: BLE001 - the report names it
            result = f"{type(err).__name__}: {err}"
        print("CASE", json.dumps([case.__name__, result]), flush=True)
