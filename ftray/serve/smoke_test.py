"""Sends one request to a fresh endpoint, so a run ends with proof that its model answers over HTTP."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from ftray import config, storage
from ftray.console import Console
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.run import start_endpoint

TIMEOUT_S = 300.0


def known_answer(run_dir: str, step: int) -> str | None:
    """The endpoint's stored answer for this checkpoint, if there is one."""
    uri = storage.join(storage.absolute(run_dir), "evaluate", "endpoint.json")
    try:
        known = storage.find_object(uri) or {}
    except storage.DamagedFile:
        return None  # it is asked again
    answer = known.get("answer")
    return answer if known.get("step") == step and isinstance(answer, str) else None


def try_endpoint(
    run: config.RunConfig, run_dir: str, model_dir: str, step: int, question: str, console: Console
) -> str:
    """Starts the endpoint on a free loopback port, requests one chat completion, stops it; stores and returns the answer."""
    console.say("\nserve: starting the endpoint for one request")
    alone = {"host": "127.0.0.1", "port": 0, "ab": {}, "canary": None}
    endpoint = start_endpoint(model_dir, ServedModels(run.name), run.serve.model_copy(update=alone), warn=console.warn)
    try:
        body = {
            "model": run.name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": min(64, run.serve.max_tokens),
            "temperature": 0,
        }
        reply = _post(f"{endpoint.url}/chat/completions", body)
    finally:
        endpoint.stop()
    answer = str(reply["choices"][0]["message"]["content"])
    console.say(
        f"serve: POST {endpoint.url}/chat/completions → 200\nquestion   {_line(question)}\nanswer     {_line(answer)}"
    )
    kept = {"step": step, "question": question, "answer": answer, "usage": reply["usage"]}
    storage.write_bytes(
        storage.join(run_dir, "evaluate", "endpoint.json"),
        json.dumps(kept, ensure_ascii=False).encode(),
        private=True,
    )
    return answer


def _post(url: str, body: dict[str, Any]) -> Any:
    import os

    headers = {"content-type": "application/json"}
    if keys := os.environ.get("FTRAY_API_KEY"):
        headers["authorization"] = f"Bearer {keys.split(',')[0].strip()}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # nosec B310 # http on loopback
        return json.loads(response.read())


def _line(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
