"""From YAML text to a tree of plain values, and from pydantic's complaints to sentences. Knows no key of a run."""

from __future__ import annotations

import difflib
import json
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ftray.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML parsers otherwise settle silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping. Raises ConfigError naming file, line and remedy."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a run file such as jobs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} can't be read ({err}); give the path of a YAML text file") from None
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys; a run file is a mapping with at least name, model and data")
    return tree


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        place = f"{origin}, line {mark.line + 1}, column {mark.column + 1}" if mark else origin
        raise ConfigError(f"{place}: {err.problem}; correct the YAML there") from None
    except yaml.YAMLError as err:
        raise ConfigError(f"{origin} is not YAML: {' '.join(str(err).split())}") from None


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Applies `a.b.0.c=value` to the tree in place; the value is read as YAML. Raises ConfigError."""
    key, sign, value = text.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise ConfigError(f"'{text}' is not an override; write key.sub=value, for example train.max_steps=10")
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{key}: '{part}' is not a place in a list of {len(node)}; use 0 to {len(node) - 1}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and not isinstance(node.get(part), (dict, list)):
                node[part] = {}
        else:  # pragma: no cover - the branch above always leaves a container
            raise ConfigError(f"{key}: nothing below '{parts[depth - 1]}'")
        if last:
            node[index] = _parse(value, f"override {key}")
        else:
            if isinstance(node, list) and not isinstance(node[index], (dict, list)):
                raise ConfigError(f"{key}: entry {index} is no mapping; override it whole")
            node = node[index]


def explain(err: ValidationError, root: type[BaseModel]) -> list[str]:
    """One sentence for each complaint of pydantic: dotted key, value, what is wrong, remedy."""
    known = known_keys(root)
    lines: list[str] = []
    for item in err.errors():
        line = _sentence(item, known)
        if line not in lines:
            lines.append(line)
    return lines


def _sentence(item: Any, known: list[str]) -> str:
    # Union members and list positions appear in pydantic's location; only names and numbers that a user wrote stay.
    spelled = [str(part) for part in item["loc"] if isinstance(part, int) or _is_key(str(part))]
    key, kind, value = ".".join(spelled), item["type"], item.get("input")
    if kind == "extra_forbidden":
        return f"unknown key {key}; {_closest(key, known)}"
    if kind == "missing":
        return f"the key {key} is missing; add it"
    shown = "" if isinstance(value, dict) else f" ({json.dumps(value, default=str, ensure_ascii=False)})"
    message = str(item["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return message if isinstance(value, dict) and not key else f"{key}{shown} {message}" if shown else f"{key}: {message}"
    if kind == "literal_error":
        return f"{key}{shown} must be one of {item['ctx']['expected'].replace(' or ', ', ')}"
    return f"{key}{shown} is wrong: {message[0].lower() + message[1:]}"


def _is_key(part: str) -> bool:
    return part.islower() and part.isidentifier() and part not in ("int", "str", "float", "constrained")


def _closest(key: str, known: list[str]) -> str:
    """Names the nearest key: first by the whole dotted name, then by the last part in any section."""
    plain = ".".join(p for p in key.split(".") if not p.isdigit())
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    leaf = plain.rsplit(".", 1)[-1]
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    near = near or difflib.get_close_matches(leaf, [k for k in known if "." not in k], n=1, cutoff=0.7)
    if not near:
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    return f"did you mean {near[0]}?" if near else "remove it; the keys are listed in docs/run-file.md"


def known_keys(root: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys below a section, list entries included without their number."""
    keys: list[str] = []
    for name, field in root.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys += [k for k in known_keys(section, f"{prefix}{name}.") if k not in keys]
    return keys


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arg in typing.get_args(annotation) for section in _sections(arg)]
