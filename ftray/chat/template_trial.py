"""Tries a chat template in a process of its own, before it is rendered in this one.

The sandbox counts all work that it knows of. A template that finds work it doesn't know of, or a fault of Jinja2 or
Python, ends in that process: it has a deadline, a memory limit and none of this process's secrets. Later renderings
stay in this process, where they are fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache

from ftray.chat.template import Template
from ftray.errors import ModelError

CPU_S = 10
WALL_S = 60.0  # a busy machine may take seconds to start a process
MEMORY_BYTES = 1 << 30
OUT_OF_MEMORY = 3
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH")
LONG_TEXT = "A line of text, <b>tags</b> and 'quotes' {\"a\": 1}.\n" * 200
ROLES = (
    ("user",),
    ("user", "assistant"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "tool", "assistant"),
    ("user", "assistant") * 8,
)


@lru_cache(maxsize=64)
def try_template(source: str) -> None:
    """Renders a few conversations in another process; once for each template.

    Args:
        source: The template's text.

    Raises:
        ModelError: It takes more than CPU_S seconds or MEMORY_BYTES.
    """
    # -P: the working directory, which may hold anything, is no place to import from.
    command = [sys.executable, "-P", "-c", "from ftray.chat.template_trial import main; main()"]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    paths = [os.path.abspath(path) for path in sys.path if path]  # noqa: PTH100 - this ftray, also where it isn't installed
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    text = json.dumps(source).encode()
    try:
        ended = subprocess.run(command, input=text, capture_output=True, env=environment, timeout=WALL_S, check=False)  # nosec B603 # a list of words, no shell
    except subprocess.TimeoutExpired:
        code, said = -1, b""
    else:
        code, said = ended.returncode, ended.stderr
    if code < 0 or code == OUT_OF_MEMORY:
        raise ModelError(
            f"the chat template takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB for a short conversation; use "
            "another base or template"
        )
    if code:
        reason = said.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise ModelError(f"the chat template can't be tried in a process of its own ({reason[0][:200]}); repair Python")


def main() -> None:
    """The other process: reads a template as JSON from standard input. What rendering refuses is told later, in words."""
    import resource

    for limit, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    source = json.load(sys.stdin)
    code = 0
    try:
        template = Template(source)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception:  # noqa: BLE001 - a template may raise anything
        os._exit(0)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for roles in ROLES:
        for content in ("Hello", LONG_TEXT):
            turns = [{"role": role, "content": content} for role in roles]
            try:
                template.render(turns, roles[-1] != "assistant", **names)
            except MemoryError:
                code = OUT_OF_MEMORY
            except Exception:  # noqa: BLE001 - as above
                pass
    os._exit(code)
