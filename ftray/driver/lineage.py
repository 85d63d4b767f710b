"""Where a run's result comes from: settings, data, base, code, packages, seeds, parent; and what of it changed since.

Kept in run.json under `lineage` once the data is indexed; its `id` is a hash of all of it, so that equal ids mean equal
origins. The id goes with every checkpoint, exported and published model. No Ray, no torch.
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
from ftray.model.fingerprint import base_files
from ftray.train.checkpoint.catalog import list_checkpoints

# Packages that may change a result; the others are named, but not compared.
DECIDING = (
    *("accelerate", "bitsandbytes", "deepspeed", "ftray", "liger-kernel", "numpy", "peft", "pyarrow", "ray"),
    *("safetensors", "tokenizers", "torch", "transformers", "triton"),
)
SHOWN = 5  # changes that are named in one sentence
UNKNOWN = "kept from here on; what came before is not known"
IMAGE, COMMIT = "FTRAY_IMAGE", "FTRAY_COMMIT"  # set where ftray comes as an image, or without its git history


def record_lineage(
    run: config.RunConfig, run_dir: str, data: PreparedData, tokenizer: str, template: str, parent: str | None
) -> str:
    """Writes the lineage into run.json, where it stands from the first checkpoint on; returns its id.

    tokenizer, template: their hashes. A run that goes on with other packages keeps its id; what changed is added.
    """
    uri = storage.join(run_dir, "run.json")
    tree = storage.read_object(uri, REMEDY)
    known = checked_lineage(tree, run_dir)
    found = list_checkpoints(run_dir)
    if known is None or not found:
        made = {
            "config_hash": run.config_hash,
            "seed": run.train.seed,
            "tokenizer_hash": tokenizer,
            "template_hash": template,
            "parent": parent,
            "base": {"name": run.model.base, "revision": run.model.revision, "files": base_files(run.model)},
            "data": {"hash": data.data_hash, "files": _data_files(data)},
            "environment": environment(),
        }
        tree["lineage"] = known = {"id": id_of(made), **made}
        if found:  # begun by a version that kept no lineage
            known["continued"] = [{"step": found[0].step, "changes": [UNKNOWN]}]
    else:
        changes = environment_changes(known["environment"], environment())
        continued = known.get("continued", [])
        told = continued[-1]["changes"] if continued else []
        if changes == [change for change in told if change != UNKNOWN]:
            return str(known["id"])
        known["continued"] = [*continued, {"step": found[0].step, "changes": changes}]
    storage.write_bytes(uri, json.dumps(tree, indent=1).encode())
    return str(known["id"])


def read_lineage(run_dir: str) -> dict[str, Any] | None:
    """What `record_lineage` wrote; None for a run that has none. Raises DamagedFile, StorageError."""
    return checked_lineage(read_identity(run_dir) or {}, run_dir)


def checked_lineage(identity: Mapping[str, Any], run_dir: str) -> dict[str, Any] | None:
    """The lineage that run.json holds, None without one. Raises DamagedFile for one that lacks what it is read for."""
    found = identity.get("lineage")
    if found is None:
        return None
    try:
        storage.parse_as(_Lineage, found)
    except ValueError as err:
        uri = storage.join(run_dir, "run.json")
        raise storage.DamagedFile(f"{uri} is damaged (lineage: {err}); {REMEDY}") from None
    lineage: dict[str, Any] = found
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
    """What a lineage must hold, however it came into run.json."""

    id: str
    config_hash: str
    base: _Base
    data: _Files
    environment: _Environment
    continued: list[_Change] = field(default_factory=list)


def id_of(lineage: Mapping[str, Any]) -> str:
    """Sixteen hex digits over what decides the result: other packages than DECIDING, and the image, don't."""
    environment = lineage["environment"]
    packages = {name: version for name, version in environment["packages"].items() if name in DECIDING}
    decides = {**lineage, "environment": {**environment, "packages": packages, "image": None}}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _data_files(data: PreparedData) -> list[dict[str, Any]]:
    """Each shard that is read, its etag, and a hash of the rows that it gives."""
    files = []
    for part, index in (("train", data.index), ("eval", data.eval_index)):
        for (source, uri), group in groupby(index.facts if index else (), key=lambda f: (f.chunk.source, f.chunk.uri)):
            facts = list(group)
            rows = hashlib.sha256(json.dumps([f.digest for f in facts]).encode()).hexdigest()[:16]
            files.append({"part": part, "source": source, "uri": uri, "etag": facts[0].chunk.etag, "rows": rows})
    return files


def changed_files(known: Mapping[str, Any], run: config.RunConfig, data: PreparedData | None = None) -> list[str]:
    """Sentences on what is other than it was: shards that went or came, files of the base; with data, shards' rows too."""
    said = []
    then = {(f["part"], f["uri"]): f["rows"] for f in known["data"]["files"]}
    if data is None:
        before = {uri for _, uri in then}
        sources = [*run.data.train, *(run.data.eval if isinstance(run.data.eval, list) else [])]
        there = {shard.uri for source in sources for shard in list_shards(source.path)}
        said += [f"{uri} is gone" for uri in sorted(before - there)]
        said += [f"{uri} is new" for uri in sorted(there - before)]
        said += _changed_base(known["base"]["files"], base_files(run.model), run.model.base)
    else:
        now = {(f["part"], f["uri"]): f["rows"] for f in _data_files(data)}
        changed = sorted(uri for key, rows in now.items() if then.get(key) != rows for uri in [key[1]])
        said += [f"{uri} gives other rows than it did" for uri in dict.fromkeys(changed)]
        if not said and data.data_hash != known["data"]["hash"]:
            said.append("the data as a whole gives other rows than it did")
    return said


def what_changed(run_dir: str, run: config.RunConfig, data: PreparedData, tokenizer: str, template: str) -> str:
    """Which of data, tokenizer and chat template are other than those that a run was trained from, with their files.

    tokenizer, template: their hashes now. For a run without a lineage: what may have changed.
    """
    base = f"model.base {run.model.base}"
    known = read_lineage(run_dir)
    if known is None:
        sources = ", ".join(source.path for source in run.data.train)
        return f"the data ({sources}), the tokenizer or the chat template of {base} changed"
    said = []
    if known.get("template_hash") not in (None, template):
        said.append(f"the chat template of {base} changed")
    elif known.get("tokenizer_hash") not in (None, tokenizer):
        said.append(f"the tokenizer of {base} changed")
    if said:
        there = _changed_base(known["base"]["files"], base_files(run.model), run.model.base)
        files = [text for text in there if "token" in text.split()[0] or "template" in text.split()[0]]
        return "; ".join(said) + (f" ({', '.join(files)})" if files else "")
    now = {(f["part"], f["uri"]) for f in _data_files(data)}
    gone = [f"{f['uri']} is gone" for f in known["data"]["files"] if (f["part"], f["uri"]) not in now]
    changes = list(dict.fromkeys([*gone, *changed_files(known, run, data)]))
    more = f", and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return f"the data changed ({', '.join(changes[:SHOWN]) or 'its rows are others'}{more})"


def _changed_base(then: Mapping[str, str], now: Mapping[str, str], base: str) -> list[str]:
    if not then or not now:  # a hub's, which nobody has asked for here
        return []
    said = [f"{name} of model.base {base} is gone" for name in sorted(then.keys() - now.keys())]
    return said + [f"{name} of model.base {base} changed" for name in sorted(now) if then.get(name) != now[name]]


@lru_cache
def environment() -> dict[str, Any]:
    """Python, packages, ftray's own code, image and kind of CPU of this process."""
    found = {
        dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]
    }
    return {
        "python": platform.python_version(),
        "cpu": _cpu(),
        "image": os.environ.get(IMAGE),
        "code": {"commit": _commit(), "sha256": _code_hash()},
        "packages": dict(sorted((name.lower().replace("_", "-"), version) for name, version in found.items())),
    }


def environment_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences on what may change a result: Python, the packages of DECIDING, ftray's code, the kind of CPU."""
    pairs = [(name, then["packages"].get(name), now["packages"].get(name)) for name in DECIDING]
    pairs += [("Python", then["python"], now["python"]), ("the CPU", then["cpu"], now["cpu"])]
    said = [f"{name} is {b or 'missing'} instead of {a or 'missing'}" for name, a, b in pairs if a != b]
    a, b = then["code"], now["code"]
    if a["sha256"] != b["sha256"]:
        said.append(f"ftray's code is {b['commit'] or b['sha256']} instead of {a['commit'] or a['sha256']}")
    return said


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
    """The commit of a checkout, with a + where its files were changed since."""
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
