"""LangChain, instructor, litellm, pydantic-ai and LlamaIndex against the endpoint, tried by hand.

They live in a venv of their own: `python -m venv v && v/bin/pip install langchain langchain-openai instructor litellm
'pydantic-ai-slim[openai]' llama-index-llms-openai-like`, then `FTRAY_CLIENTS_PYTHON=v/bin/python pytest <this file>`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from ftray.chat import ChatFormat, ToolCall
from ftray.engine.protocol import SamplingParams
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.routes import build_api
from tests import tiny
from tests.call_templates import with_template
from tests.scripted_engine import ScriptedEngine
from tests.unit.test_serve_tools import calling, written

PYTHON = os.environ.get("FTRAY_CLIENTS_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="FTRAY_CLIENTS_PYTHON names no Python with the client libraries")
ADA: dict[str, Any] = {"name": "Ada", "age": 36}
SUNNY, CALL = "It is sunny in Rio.", '"get_weather"'


class WeatherEngine(ScriptedEngine):
    """Calls get_weather if there is such a tool, and answers its result. A constrained answer is the first that is allowed."""

    def _answer(self, params: SamplingParams) -> list[int]:
        prompt = self.tokenizer.decode(self.prompts[-1])
        first = CALL if "get_weather" in prompt and "<|im_start|>tool" not in prompt else SUNNY
        self.texts.sort(key=lambda text: first not in text)
        return super()._answer(params)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    calls = [ToolCall("get_weather", {"city": "Rio"}), ToolCall("User", ADA), ToolCall("final_result", ADA)]
    _, texts = written("hermes", *map(calling, calls))
    tokenizer = with_template(tiny.make_tokenizer(), "hermes")
    answers = [*texts, SUNNY, json.dumps(ADA, separators=(",", ":"))]
    engine = WeatherEngine(tokenizer, answers, ChatFormat(tokenizer).stop_token_ids)
    app = build_api(engine, ServedModels("m"), max_tokens=5000)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        command = [str(PYTHON), str(Path(__file__).with_name("client_libraries.py"))]
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OPENAI_API_KEY": "x"}
        done = subprocess.run(
            [*command, url], capture_output=True, text=True, timeout=300, env=environment, check=False
        )
        server.should_exit = True
        thread.join()
    lines = [json.loads(line.removeprefix("CASE ")) for line in done.stdout.splitlines() if line.startswith("CASE ")]
    assert lines, done.stderr
    return dict(lines)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("langchain_agent", [["human", "ai", "tool", "ai"], {"city": "Rio"}, SUNNY]),
        ("langchain_stream", {"city": "Rio"}),
        ("langchain_responses", {"city": "Rio"}),
        ("langchain_structured", [ADA, ADA]),
        ("instructor_modes", [ADA] * 5),
        ("litellm_calls", [{"city": "Rio"}] * 2),
        ("litellm_overflow", "recognized"),
        ("pydantic_ai_agent", [SUNNY, SUNNY, ADA]),
        ("llama_index_chat", [SUNNY, SUNNY]),
    ],
)
def test_client_libraries_work_unchanged(results: dict[str, Any], case: str, expected: Any) -> None:
    assert results[case] == expected
