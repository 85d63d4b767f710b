"""Files of a stranger's model directory, checked before a library reads them: config, weight index, tokenizer.

A config may name code or kernels to load, an index may name files outside the directory, and a tokenizer may replace a
character by megabytes. Knows JSON, paths and the hub's cache; loads no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ftray.errors import ModelError

MAX_CONFIG_BYTES = 1 << 24
MAX_TOKENIZER_BYTES = 1 << 28
MAX_DEPTH = 64
# Values of `*_implementation` that name functions of transformers or torch; others name kernels on a hub, which are code.
IMPLEMENTATIONS = frozenset(
    [
        "eager",
        "sdpa",
        "flash_attention_2",
        "flash_attention_3",
        "flex_attention",
        "batched_mm",
        "grouped_mm",
        "default",
        "",
    ]
)
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
TRANSFORMS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
MAX_GROWTH = 64  # characters that the replacements of a tokenizer may make of one
MAX_PARTS = 100


def check_model_files(directory: Path) -> None:
    """Checks the small files of a model directory; those that are missing are left to the library that wants them.

    Args:
        directory: A local directory, in the layout of `save_pretrained`.

    Raises:
        ModelError: A file is damaged, names a file outside the directory or code to load, or a tokenizer expands text.
    """
    for name in CONFIGS:
        if (tree := _read(directory / name, MAX_CONFIG_BYTES)) is not None:
            check_config(tree, directory / name)
    for path in sorted(directory.glob("*.index.json")):
        _check_index(path)
    path = directory / "tokenizer.json"
    if (tree := _read(path, MAX_TOKENIZER_BYTES)) is not None:
        check_tokenizer(tree, path)


@lru_cache(maxsize=8)
def check_hub_model(name: str, revision: str | None) -> str:
    """Checks the small files of a hub's model as `check_model_files` does, before a library reads them.

    Args:
        name: `org/name`.
        revision: Branch, tag or commit; None: the main branch.

    Returns:
        The commit whose files were checked.

    Raises:
        ModelError: As `check_model_files`.
        OSError: The model can't be had; huggingface_hub's own errors are such, or ValueError.
    """
    from huggingface_hub import snapshot_download

    patterns = [*CONFIGS, "*.index.json", "tokenizer.json"]
    directory = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    check_model_files(directory)
    return directory.name


def check_config(tree: Any, path: Path) -> None:
    """Refuses keys of a config that load kernels from a hub, or name a file elsewhere. Raises ModelError."""
    if not isinstance(tree, dict):
        raise ModelError(f"{path} is not a JSON object; copy or download it again")
    for key, value in _pairs(tree, path):
        if key.endswith(("_implementation", "_implementation_internal")):
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and name not in IMPLEMENTATIONS:
                    raise ModelError(
                        f"{path}: {key} is {_shown(name)}, which may be code from a hub; remove the key, or use one of "
                        f"{', '.join(sorted(filter(None, IMPLEMENTATIONS)))}"
                    )
        elif key in ("transformers_weights", "gguf_file", "fast_tokenizer_files", "vocab_file", "merges_file"):
            for name in value if isinstance(value, list) else [value]:
                if name is not None:
                    _check_name(name, path, key)


def check_tokenizer(tree: Any, path: Path) -> None:
    """Refuses a tokenizer whose replacements blow text up. Raises ModelError."""
    if not isinstance(tree, dict):
        raise ModelError(f"{path} is not a JSON object; copy or download it again")
    for place in TRANSFORMS:
        growth, parts = 1.0, 0
        for part in _parts(tree.get(place), path):
            parts += 1
            kind = part.get("type")
            if kind == "Replace":
                pattern, content = part.get("pattern"), part.get("content")
                plain = pattern.get("String") if isinstance(pattern, dict) else None
                if isinstance(content, str):
                    growth *= max(1.0, len(content) / max(1, len(plain) if isinstance(plain, str) else 1))
            elif kind == "Prepend" and isinstance(part.get("prepend"), str):
                growth *= max(1, len(part["prepend"]))
        if growth > MAX_GROWTH or parts > MAX_PARTS:
            raise ModelError(
                f"{path}: the {place} makes up to {growth:.4g} characters of one in {parts} parts, allowed are {MAX_GROWTH} and "
                f"{MAX_PARTS}; use another tokenizer"
            )


def _check_index(path: Path) -> None:
    tree = _read(path, MAX_CONFIG_BYTES)
    names = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(names, dict):
        raise ModelError(f"{path} is damaged: it has no weight_map; copy or download it again")
    for name in names.values():
        _check_name(name, path, "weight_map")


def _check_name(name: object, path: Path, key: str) -> None:
    """Refuses what is not a file's name below the directory."""
    parts = PurePosixPath(name.replace("\\", "/")).parts if isinstance(name, str) else ()
    if not isinstance(name, str) or not parts or parts[0] == "/" or ".." in parts or "\0" in name or ":" in parts[0]:
        raise ModelError(
            f"{path}: {key} names {_shown(name)}, which is not a file in the model's directory; correct it"
        )


def _read(path: Path, most_bytes: int) -> Any:
    """A JSON file, or None where there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise ModelError(f"{path} can't be read ({err.strerror}); copy or download it again") from None
    if len(data) > most_bytes:
        raise ModelError(f"{path} has more than {most_bytes >> 20} MiB; use another model")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as err:
        raise ModelError(f"{path} is not JSON ({str(err)[:120]}); copy or download it again") from None


def _pairs(tree: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ModelError(f"{path} is nested deeper than {MAX_DEPTH} levels; use another model")
        if isinstance(node, dict):
            yield from ((str(key), value) for key, value in node.items())
        below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting += [(each, depth + 1) for each in below if isinstance(each, (dict, list))]


def _parts(tree: Any, path: Path) -> Iterator[dict[str, Any]]:
    """The members of a transform, also of sequences of sequences."""
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ModelError(f"{path} is nested deeper than {MAX_DEPTH} levels; use another tokenizer")
        if isinstance(node, dict):
            yield node
        below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting += [(each, depth + 1) for each in below if isinstance(each, (dict, list))]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def check_model_directory(directory: Path) -> None:
    """Raises ModelError naming what a model directory lacks: config, safetensors, tokenizer."""
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory; make a model with `ftray export`")
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise ModelError(f"{directory} holds an adapter without its base; merge them with `ftray export`")
    wanted = {
        "config.json": "config.json",
        "weights (*.safetensors)": "*.safetensors",
        "a tokenizer (tokenizer.json)": "tokenizer*.json",
    }
    missing = [what for what, pattern in wanted.items() if not any(directory.glob(pattern))]
    if missing:
        raise ModelError(f"{directory} is not a model: it lacks {', '.join(missing)}; make one with `ftray export`")
    check_model_files(directory)
