"""The lineage of a run: settings, data, base, code, packages, seeds and parent; and what has changed since.

It is kept in run.json under `lineage` once the data is indexed. Its `id` is a hash of all of it, so that equal ids mean equal
origins; every checkpoint, exported and published model has the id. No Ray, no torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from ftray import config, storage
from ftray.data.prepare import PreparedData
from ftray.data.sources import list_shards
from ftray.driver.run_record import REMEDY, read_identity
from ftray.model.load import resolve_base
from ftray.train.checkpoint.catalog import list_checkpoints

# Packages that may change a result; others are recorded, but not compared.
DECIDING = (
    *("accelerate", "bitsandbytes", "deepspeed", "ftray", "liger-kernel", "numpy", "peft", "pyarrow", "ray"),
    *("safetensors", "tokenizers", "torch", "transformers", "triton"),
)
SHOWN = 5  # changes in one message
UNKNOWN = "recorded from here on; earlier steps are unknown"
WHOLE_BYTES, END_BYTES = 1 << 26, 1 << 20  # larger files are hashed by their size and both ends
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".gguf")
IMAGE, COMMIT = "FTRAY_IMAGE", "FTRAY_COMMIT"  # set in images, and where there is no git history


def record_lineage(
    run: config.RunConfig, run_dir: str, data: PreparedData, tokenizer: str, template: str, parent: str | None
) -> str:
    """Writes the lineage into run.json, where it is fixed from the first checkpoint on.

    A run that continues with other packages keeps its id; the changes are added.

    Args:
        run: The run's configuration.
        run_dir: The run's directory.
        data: The run's data.
        tokenizer: Hash of the tokenizer.
        template: Hash of the chat template.
        parent: The checkpoint that the run started from.

    Returns:
        The id.
    """
    uri = storage.join(run_dir, "run.json")
    tree = storage.read_object(uri, REMEDY)
    known = checked_lineage(tree, run_dir)
    checkpoints = list_checkpoints(run_dir)
    if known is None or not checkpoints:
        lineage = {
            "config_hash": run.config_hash,
            "seed": run.train.seed,
            "tokenizer_hash": tokenizer,
            "template_hash": template,
            "parent": parent,
            "base": {"name": run.model.base, "revision": run.model.revision, "files": base_files(run.model)},
            "data": {"hash": data.data_hash, "files": _data_files(data)},
            "environment": environment(),
        }
        tree["lineage"] = known = {"id": id_of(lineage), **lineage}
        if checkpoints:  # started by a version without lineage
            known["continued"] = [{"step": checkpoints[0].step, "changes": [UNKNOWN]}]
    else:
        changes = environment_changes(known["environment"], environment())
        continued = known.get("continued", [])
        recorded = continued[-1]["changes"] if continued else []
        if changes == [change for change in recorded if change != UNKNOWN]:
            return str(known["id"])
        known["continued"] = [*continued, {"step": checkpoints[0].step, "changes": changes}]
    storage.write_bytes(uri, json.dumps(tree, indent=1).encode())
    return str(known["id"])


def read_lineage(run_dir: str) -> dict[str, Any] | None:
    """The lineage of a run; None for a run without one. Raises DamagedFile, StorageError."""
    return checked_lineage(read_identity(run_dir) or {}, run_dir)


def checked_lineage(identity: Mapping[str, Any], run_dir: str) -> dict[str, Any] | None:
    """The lineage in the content of run.json; None without one. Raises DamagedFile for an invalid one."""
    tree = identity.get("lineage")
    if tree is None:
        return None
    try:
        storage.parse_as(_Lineage, tree)
    except ValueError as err:
        uri = storage.join(run_dir, "run.json")
        raise storage.DamagedFile(f"{uri} is damaged (lineage: {err}); {REMEDY}") from None
    lineage: dict[str, Any] = tree
    return lineage


@dataclass
class _Code:
    commit: str | None
    sha256: str


@dataclass
class _Environment:
    python: str
    cpu: str
    image: str | None
    code: _Code
    packages: dict[str, str]


@dataclass
class _LineageFile:
    part: str
    uri: str
    rows: str


@dataclass
class _Files:
    hash: str
    files: list[_LineageFile]


@dataclass
class _Base:
    name: str
    files: dict[str, str]


@dataclass
class _Change:
    step: int
    changes: list[str]


@dataclass
class _Lineage:
    """The keys that a lineage must have."""

    id: str
    config_hash: str
    base: _Base
    data: _Files
    environment: _Environment
    continued: list[_Change] = field(default_factory=list)


def id_of(lineage: Mapping[str, Any]) -> str:
    """A hash of everything that may change the result, sixteen hex digits; without other packages than DECIDING and the image."""
    environment = lineage["environment"]
    packages = {name: version for name, version in environment["packages"].items() if name in DECIDING}
    deciding = {**lineage, "environment": {**environment, "packages": packages, "image": None}}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def _data_files(data: PreparedData) -> list[dict[str, Any]]:
    """Each shard with its etag and a hash of its packed sequences."""
    files = []
    for part, index in (("train", data.index), ("eval", data.eval_index)):
        for (source, _), group in groupby(index.facts if index else (), key=lambda f: (f.chunk.source, f.chunk.uri)):
            facts = list(group)
            rows = hashlib.sha256(json.dumps([f.digest for f in facts]).encode()).hexdigest()[:16]
            common = {
                "part": part,
                "source": source,
                "rows": rows,
            }  # small files that are packed together share sequences
            files += [{**common, "uri": piece.uri, "etag": piece.etag} for piece in facts[0].chunk.pieces]
    return files


def base_files(model: config.ModelConfig) -> dict[str, str]:
    """Hashes of the files in a base's directory by name; the commit of a hub model; {} if that is unknown here.

    Workers download a hub model's files when they need them, so the files that are here do not matter. Raises ModelError as
    `resolve_base`.
    """
    directory = Path(resolve_base(model))
    if not directory.is_dir():
        return _hub_commit(model)
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name.endswith(SUFFIXES))
    return {path.name: _file_hash(path) for path in files}


def _hub_commit(model: config.ModelConfig) -> dict[str, str]:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    return {"commit": Path(path).parent.name} if isinstance(path, str) else {}


def _file_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(END_BYTES))
            file.seek(size - END_BYTES)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def changed_files(known: Mapping[str, Any], run: config.RunConfig, data: PreparedData | None = None) -> list[str]:
    """Messages about changed shards and files of the base; with `data`, about changed packed sequences of shards."""
    messages = []
    then = {(f["part"], f["uri"]): f["rows"] for f in known["data"]["files"]}
    if data is None:
        before = {uri for _, uri in then}
        sources = [*run.data.train, *(run.data.eval if isinstance(run.data.eval, list) else [])]
        there = {shard.uri for source in sources for shard in list_shards(source.path)}
        messages += [f"{uri} is gone" for uri in sorted(before - there)]
        messages += [f"{uri} is new" for uri in sorted(there - before)]
        messages += _changed_base(known["base"]["files"], base_files(run.model), run.model.base)
    else:
        now = {(f["part"], f["uri"]): f["rows"] for f in _data_files(data)}
        changed = sorted(uri for key, rows in now.items() if then.get(key) != rows for uri in [key[1]])
        messages += [f"{uri} now gives other packed sequences" for uri in dict.fromkeys(changed)]
        if not messages and data.data_hash != known["data"]["hash"]:
            messages.append("the data as a whole now gives other packed sequences")
    return messages


def what_changed(run_dir: str, run: config.RunConfig, data: PreparedData, tokenizer: str, template: str) -> str:
    """A message about which of data, tokenizer and chat template have changed since a run was trained, with their files.

    For a run without a lineage, what may have changed. tokenizer, template: Their current hashes.
    """
    base = f"model.base {run.model.base}"
    known = read_lineage(run_dir)
    if known is None:
        sources = ", ".join(source.path for source in run.data.train)
        return f"the data ({sources}), the tokenizer or the chat template of {base} changed"
    messages = []
    if known.get("template_hash") not in (None, template):
        messages.append(f"the chat template of {base} changed")
    elif known.get("tokenizer_hash") not in (None, tokenizer):
        messages.append(f"the tokenizer of {base} changed")
    if messages:
        changed = _changed_base(known["base"]["files"], base_files(run.model), run.model.base)
        files = [text for text in changed if "token" in text.split()[0] or "template" in text.split()[0]]
        return "; ".join(messages) + (f" ({', '.join(files)})" if files else "")
    now = {(f["part"], f["uri"]) for f in _data_files(data)}
    gone = [f"{f['uri']} is gone" for f in known["data"]["files"] if (f["part"], f["uri"]) not in now]
    changes = list(dict.fromkeys([*gone, *changed_files(known, run, data)]))
    more = f", and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return f"the data changed ({', '.join(changes[:SHOWN]) or 'it gives other packed sequences'}{more})"


def _changed_base(then: Mapping[str, str], now: Mapping[str, str], base: str) -> list[str]:
    if not then or not now:  # a hub model that is not cached here
        return []
    gone = [f"{name} of model.base {base} is gone" for name in sorted(then.keys() - now.keys())]
    return gone + [f"{name} of model.base {base} changed" for name in sorted(now) if then.get(name) != now[name]]


@lru_cache
def environment() -> dict[str, Any]:
    """Python, packages, ftray's code, image and CPU type of this process."""
    versions = {
        dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]
    }
    return {
        "python": platform.python_version(),
        "cpu": _cpu(),
        "image": os.environ.get(IMAGE),
        "code": {"commit": _commit(), "sha256": _code_hash()},
        "packages": dict(sorted((name.lower().replace("_", "-"), version) for name, version in versions.items())),
    }


def environment_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Messages about changes that may change a result: Python, the packages of DECIDING, ftray's code, the CPU type."""
    pairs = [(name, then["packages"].get(name), now["packages"].get(name)) for name in DECIDING]
    pairs += [("Python", then["python"], now["python"]), ("the CPU", then["cpu"], now["cpu"])]
    messages = [f"{name} is {b or 'missing'} instead of {a or 'missing'}" for name, a, b in pairs if a != b]
    a, b = then["code"], now["code"]
    if a["sha256"] != b["sha256"]:
        messages.append(f"ftray's code is {b['commit'] or b['sha256']} instead of {a['commit'] or a['sha256']}")
    return messages


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _package() -> Path:
    return Path(__file__).parents[1]


def _code_hash() -> str:
    digest = hashlib.sha256()
    for file in sorted(_package().rglob("*.py")):
        digest.update(f"{file.relative_to(_package())}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    """The commit of a checkout; with + if its files have changed."""
    root = _package().parent
    if not (root / ".git").exists():
        return os.environ.get(COMMIT)
    try:
        commit, changed = (
            subprocess.run(  # nosec B603 B607 # a list of words, no shell
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True
            ).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "--", "ftray"))
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(COMMIT)
    return commit.strip()[:12] + ("+" if changed.strip() else "")
