"""Tries a chat template in a separate process before this process renders it.

The sandbox counts the work that it knows about. A template that finds other work, or a fault of Jinja2 or Python, ends in
that process, which has a deadline, a memory limit and none of this process's secrets. Later renderings stay in this process,
where they are fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from typing import Any

from ftray.errors import ModelError

CPU_S = 10
WALL_S = 60.0  # a busy machine may take seconds to start a process
MEMORY_BYTES = 1 << 30
OUT_OF_MEMORY = 3  # exit status
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH")
LONG_TEXT = "A line of text, <b>tags</b> and 'quotes' {\"a\": 1}.\n" * 200
TOOL = {"type": "object", "properties": {"a": {"type": "string", "description": "b"}}, "required": ["a"]}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "description": "g", "parameters": TOOL}}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": role, "content": content} for role in roles]
    for roles in (
        ("user",),
        ("user", "assistant"),
        ("system", "user", "assistant", "user"),
        ("user", "assistant", "tool", "assistant"),
        ("user", "assistant") * 8,
    )
    for content in ("Hello", LONG_TEXT)
]
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": LONG_TEXT,
        "tool_calls": [
            {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"a": LONG_TEXT}}}
        ],
    },
    {"role": "tool", "content": LONG_TEXT, "tool_call_id": "call00000", "name": "f"},
]


@lru_cache(maxsize=64)
def try_template(source: str) -> None:
    """Renders a few conversations in another process, once per template.

    Args:
        source: The template's text.

    Raises:
        ModelError: It takes more than CPU_S seconds or MEMORY_BYTES.
    """
    # -P: the working directory, which may contain anything, is not searched for modules.
    command = [sys.executable, "-P", "-c", "from ftray.chat.template_trial import main; main()"]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    paths = [os.path.abspath(path) for path in sys.path if path]  # noqa: PTH100 - this ftray, also if it isn't installed
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    text = json.dumps(source).encode()
    try:
        process = subprocess.run(command, input=text, capture_output=True, env=environment, timeout=WALL_S, check=False)  # nosec B603 # a list of words, no shell
        status, errors = process.returncode, process.stderr
    except subprocess.TimeoutExpired:
        status, errors = -1, b""
    if status < 0 or status == OUT_OF_MEMORY:
        raise ModelError(
            f"the chat template takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB for a short conversation; use "
            "another base or template"
        )
    if status:
        reason = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise ModelError(
            f"the chat template could not be tried in a separate process ({reason[0][:200]}); repair Python"
        )


def main() -> None:
    """The other process: reads a template as JSON from standard input. Refusals are reported later, by the sandbox."""
    import resource

    from ftray.chat.template import Template

    for limit, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    source = json.load(sys.stdin)
    status = 0
    try:
        template = Template(source)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception:  # noqa: BLE001 - a template may raise anything
        os._exit(0)
    for turns in (*CONVERSATIONS, CALLING):
        tools = TOOLS if turns is CALLING else ()
        try:
            tokens = {"bos_token": "<s>", "eos_token": "</s>"}
            template.render(turns, turns[-1]["role"] != "assistant", tools, **tokens)
        except MemoryError:
            status = OUT_OF_MEMORY
        except Exception:  # noqa: BLE001 # nosec B112 - as above
            continue
    os._exit(status)
