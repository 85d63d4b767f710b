"""Records for the data benchmarks: real prose (docstrings of Python's library), cut into conversations by a seed.

The same arguments give the same bytes on the same Python. Lengths are log-normal, as those of chat data are.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from functools import lru_cache
from itertools import count
from pathlib import Path

MODULES = """
argparse ast asyncio/base_events asyncio/tasks calendar codecs collections/__init__ concurrent/futures/_base
configparser contextlib csv datetime decimal difflib doctest email/message enum fractions functools gettext heapq
http/client http/cookiejar imaplib importlib/_bootstrap inspect io ipaddress logging/__init__ mailbox numbers
optparse os pathlib pdb pickle pickletools plistlib random re/__init__ sched selectors shelve shutil smtplib socket
sqlite3/dump ssl statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback
turtle types typing unittest/case unittest/mock urllib/parse urllib/request uuid warnings weakref xml/dom/minidom
zipfile
"""


def write_corpus(directory: Path, size_mb: float, shard_mb: float = 3.9, seed: int = 0) -> Path:
    """Writes size_mb of `messages` records as .jsonl shards of up to shard_mb each; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    left = size_mb * 1e6
    for n in count():
        if left <= 0:
            return directory
        lines, room = [], min(shard_mb * 1e6, left)
        while room > 0:
            line = json.dumps(_record(rng), ensure_ascii=False) + "\n"
            room -= len(line.encode())
            lines.append(line)
        # the last line overflows the room, so that a shard of 3.9 MB stays below a chunk of 4 MB
        (directory / f"part-{n:05d}.jsonl").write_text("".join(lines), encoding="utf-8")
        left -= shard_mb * 1e6
    return directory


def _record(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    question, answer = (_passage(rng, mean, most) for mean, most in ((5.2, 3000), (6.3, 9000)))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _passage(rng: random.Random, mean: float, most: int) -> str:
    """Sentences of about exp(mean) characters in all, log-normal."""
    sentences = _sentences()
    size = min(most, int(rng.lognormvariate(mean, 0.9)))
    at, found = rng.randrange(len(sentences)), []
    while size > 0:
        found.append(sentences[at % len(sentences)])
        size -= len(found[-1])
        at += 1
    return " ".join(found)


@lru_cache(maxsize=1)
def _sentences() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for module in MODULES.split():
        path = library / f"{module}.py"
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found += re.split(r"(?<=[.:])\s+", ast.get_docstring(node) or "")
    # Some models have control tokens like <filename>, which ftray refuses inside a text.
    return [s for s in found if len(s) > 10 and s[0].isalpha() and not re.search(r"<\w+>", s)]
