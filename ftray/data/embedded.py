"""Data that needs no download: functions of Python's standard library and their one-line docstrings.

`embedded:stdlib-docstrings/train` and `/eval` are directories of .jsonl shards in ftray's cache, written on first use from the
standard library of the running Python. The split is by module, so no file is on both sides. Half of the shards contain
`messages` records, the other half `prompt`/`completion` records.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ftray import storage
from ftray.errors import DataError

NAME = "embedded:stdlib-docstrings"
VERSION = "1"  # part of the cache directory's name: increase it when the records change
TASK = "Write the one-line docstring of this Python function.\n\n"
NUM_EVAL_RECORDS = 96
NUM_TRAIN_CHARS = 158_000  # code and docstrings: about 80,000 tokens, including those of the template
SHARD_RECORDS = 200
MAX_CODE_CHARS = 900
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "ensurepip",
}


def resolve(path: str) -> str:
    """The local directory of an `embedded:` source, written if it does not exist. Raises DataError for an unknown name."""
    name, _, part = path.rpartition("/")
    if name != NAME or part not in ("train", "eval"):
        raise DataError(f"{path} is not an embedded data set; use {NAME}/train or {NAME}/eval")
    version = f"{VERSION}-py{sysconfig.get_python_version()}"
    directory = storage.cache_directory() / f"stdlib-docstrings-{version}"
    if not (directory / "eval" / "part-000.jsonl").exists():
        _write(directory)
    return str(directory / part)


def _write(directory: Path) -> None:
    train, evaluation = _split(list(_functions(Path(sysconfig.get_paths()["stdlib"]))))
    for part, records in (("train", train), ("eval", evaluation)):  # eval last: it marks the directory as complete
        for n in reversed(range(0, len(records), SHARD_RECORDS)):
            lines = [
                _record(code, doc, as_messages=n // SHARD_RECORDS % 2 == 0)
                for code, doc in records[n : n + SHARD_RECORDS]
            ]
            storage.write_bytes(str(directory / part / f"part-{n // SHARD_RECORDS:03d}.jsonl"), "".join(lines).encode())


def _split(functions: list[tuple[str, str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Whole modules go to eval, in the order of their hashes, until it is full, then to train. Duplicates are dropped."""
    known: set[str] = set()
    train: list[tuple[str, str]] = []
    evaluation: list[tuple[str, str]] = []
    chars, eval_modules = 0, set()
    for module, code, doc in sorted(functions, key=lambda f: (_hash(f[0]), _hash(f[1]))):
        if doc in known or code in known:
            continue
        if module in eval_modules or len(evaluation) < NUM_EVAL_RECORDS:
            eval_modules.add(module)
            if len(evaluation) < NUM_EVAL_RECORDS:
                evaluation.append((code, doc))
        elif chars < NUM_TRAIN_CHARS:
            train.append((code, doc))
            chars += len(code) + len(doc)
        known |= {doc, code}
    return train, evaluation


def _record(code: str, doc: str, as_messages: bool) -> str:
    question = f"{TASK}```python\n{code}\n```"
    record: dict[str, object] = {"prompt": question, "completion": doc}
    if as_messages:
        record = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": doc}]}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _functions(root: Path) -> Iterator[tuple[str, str, str]]:
    """(module file, code without its docstring, docstring) of each function with a one-line docstring."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # skip files that this Python cannot read
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                doc = ast.get_docstring(node)
                if doc and 20 <= len(doc) <= 240 and re.fullmatch(r"[A-Z][^\n]*\.", doc):
                    node.body = node.body[1:]
                    code = ast.unparse(node)
                    if len(code) <= MAX_CODE_CHARS and "<|" not in code:
                        yield str(relative), code, doc


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
