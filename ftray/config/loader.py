"""Reads YAML into plain values, applies overrides, and turns validation errors into sentences."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ftray.config.aliases import alias_hint
from ftray.errors import ConfigError

MAX_YAML_CHARS = 1 << 16  # a run file has a few thousand; PyYAML takes a second or two for this many
MAX_YAML_SIZE = 100_000  # values after expanding aliases; CHARS_PER_VALUE characters of text count as one
CHARS_PER_VALUE = 16
MAX_NUMBER_CHARS = 100
MAX_COMPLAINTS = 100


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys, aliases that expand without bound, and huge numbers."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_expanded(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in keys:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' appears twice", problem_mark=key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_NUMBER_CHARS:
            problem = f"a number of {len(node.value)} digits is too long for any key"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_yaml_int(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _check_expanded(root: yaml.Node) -> None:
    """Rejects a document that is too large after alias expansion, or that contains itself.

    Nine levels of nine aliases expand to a billion values. The nodes themselves are few: each is counted once, after its
    children.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    waiting: list[tuple[yaml.Node, bool]] = [(root, False)]
    while waiting:
        node, children_done = waiting.pop()
        if id(node) in sizes:
            continue
        children = _children(node)
        if not children_done:
            if id(node) in open_nodes:
                raise yaml.MarkedYAMLError(
                    problem="an alias refers to a node that contains it", problem_mark=node.start_mark
                )
            open_nodes.add(id(node))
            waiting.append((node, True))
            waiting += [(child, False) for child in children if id(child) not in sizes]
            continue
        own = 1 + (len(node.value) // CHARS_PER_VALUE if isinstance(node, yaml.ScalarNode) else 0)
        sizes[id(node)] = own + sum(sizes[id(child)] for child in children)
        open_nodes.discard(id(node))
        if sizes[id(node)] > MAX_YAML_SIZE:
            problem = f"after expanding its aliases this has more than {MAX_YAML_SIZE} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping. Raises ConfigError naming file, line and remedy."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_YAML_CHARS + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; use a run file such as jobs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} can't be read ({err}); use a YAML text file") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} has no keys; a run file needs at least name, model and data")
    return tree


def parse_yaml(text: str, origin: str) -> Any:
    """Parses untrusted YAML into plain values. origin: its name, for messages. Raises ConfigError."""
    if len(text) > MAX_YAML_CHARS:
        raise ConfigError(f"{origin} has more than {MAX_YAML_CHARS} characters; use a run file")
    try:
        return yaml.load(text, _StrictLoader)  # nosec B506 # a safe loader with bounded aliases
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        place = f"{origin}, line {mark.line + 1}, column {mark.column + 1}" if mark else origin
        raise ConfigError(f"{place}: {_clip(err.problem)}; correct the YAML there") from None
    except yaml.YAMLError as err:
        raise ConfigError(f"{origin} is not YAML: {_clip(err)}; correct it") from None
    except Exception as err:  # noqa: BLE001 - nested thousands deep, a date such as 2024-13-45, `!!bool x`: a KeyError
        raise ConfigError(f"{origin} can't be read: {_clip(err)}; correct the YAML there") from None


def _clip(problem: object) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Applies the override `a.b.0.c=value` to the tree in place; the value is YAML. Raises ConfigError."""
    key, sign, value = text.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise ConfigError(f"'{text}' is not an override; write key.sub=value, for example train.max_steps=10")
    put_value(tree, key, parse_yaml(value, f"override {key}"))


def put_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of the tree in place, and creates missing mappings. Raises ConfigError."""
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        place: Any = _place_in_list(node, part, key, above) if isinstance(node, list) else part
        if depth == len(parts) - 1:
            node[place] = value
            return
        below = node[place] if isinstance(node, list) else node.get(place)
        if below is None and isinstance(node, dict):
            below = {}
        if not isinstance(below, (dict, list)):
            raise ConfigError(
                f"{key}: {'.'.join(parts[: depth + 1])} is {_shown(below)} and has no keys; override it as a whole"
            )
        node[place] = copy.copy(below)  # an anchor may use one mapping in two places
        node = node[place]


def _place_in_list(node: list[Any], part: str, key: str, above: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    remedy = f"use 0 to {len(node) - 1}" if node else f"override {above} as a whole"
    raise ConfigError(f"{key}: '{part}' is not an index of {above}, a list of {len(node)}; {remedy}")


def explain(err: ValidationError, root: type[BaseModel], tree: Mapping[str, Any]) -> list[str]:
    """Returns one sentence per wrong key of the tree, with its value, the expected value and the remedy."""
    schema = Schema(root)
    complaints: dict[tuple[str, ...], list[Any]] = {}
    errors = err.errors()
    for item in errors[:MAX_COMPLAINTS]:
        complaints.setdefault(_written_key(item, tree), []).append(item)
    # For a union pydantic reports every member; an error further down shows the member that was meant.
    sentences = [
        _sentence(parts, items, schema)
        for parts, items in complaints.items()
        if not any(other[: len(parts)] == parts and other != parts for other in complaints) or not parts
    ]
    more = len(errors) - MAX_COMPLAINTS
    return [*sentences, f"and {more} more; correct these first"] if more > 0 else sentences


def _written_key(item: Any, tree: Any) -> tuple[str, ...]:
    """The parts of a dotted key as the user wrote them, without pydantic's names of union members.

    A key of a mapping is one part and may contain dots.
    """
    spelled: list[str] = []
    for part in item["loc"]:
        if part in (range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ()):
            tree = tree[part]
        elif item["type"] not in ("missing", "invalid_key") or part != item["loc"][-1]:
            continue
        spelled.append(str(part))
    return tuple(spelled)


def _sentence(parts: tuple[str, ...], items: list[Any], schema: Schema) -> str:
    key = ".".join(parts)
    items = sorted(items, key=lambda item: item["type"] != "value_error")  # ftray's own messages first
    kind, value, context = items[0]["type"], items[0].get("input"), items[0].get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key}; {schema.closest(parts)}"
    if kind == "missing":
        return f"the key {key} is missing; add it"
    if kind == "invalid_key":
        return f"the key {key} is not text; put it in quotes, or remove it"
    if "[key]" in items[0]["loc"]:
        return f"unknown key {key}; use {context['expected'].replace(' or ', ', ')}"
    if kind == "value_error":
        message = str(items[0]["msg"]).removeprefix("Value error, ")
        if isinstance(value, dict):
            return f"{key}: {message}" if key else message
        return f"{key}{'' if isinstance(value, list) else f' ({_shown(value)})'} {message}"
    shown = "" if isinstance(value, dict) else f" ({_shown(value)})"
    for name, words in LIMITS.items():
        if name in context and len(items) == 1:
            return f"{key}{shown} must be {words} {_format_number(context[name])}"
    quoted = "; put it in quotes" if kind == "string_type" and not isinstance(value, (dict, list, type(None))) else ""
    return f"{key}{shown} must be {schema.expected(parts)}{quoted}"


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # YAML can express a list that contains itself
        text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Schema:
    """The schema of the run file in words, for messages and for the reference page."""

    def __init__(self, root: type[BaseModel]) -> None:
        self.tree = root.model_json_schema()

    def options(self, node: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The alternatives of a schema node, without null."""
        if "$ref" in node:
            return self.options(self.tree["$defs"][node["$ref"].rsplit("/", 1)[-1]])
        if "anyOf" in node:
            return [plain for member in node["anyOf"] for plain in self.options(member)]
        return [] if node.get("type") == "null" else [dict(node)]

    def sections(self, node: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The sections that a value may be, or may contain as a list or mapping."""
        sections = []
        for plain in self.options(node):
            if plain.get("type") == "array":
                sections += self.sections(plain["items"])
            elif isinstance(plain.get("additionalProperties"), dict):
                sections += self.sections(plain["additionalProperties"])
            elif "properties" in plain:
                sections.append(plain)
        return sections

    def known(self, node: Mapping[str, Any] | None = None, prefix: str = "") -> Iterator[str]:
        """All dotted keys, without indexes of lists and keys of mappings."""
        for section in self.sections(node or self.tree):
            for name, below in section["properties"].items():
                yield prefix + name
                yield from self.known(below, f"{prefix}{name}.")

    def expected(self, parts: Sequence[str]) -> str:
        """The expected value of a key, in words."""
        nodes = self.options(self.tree)
        for part in parts:
            below: list[Any] = []
            for node in nodes:
                if part.isdecimal() and "items" in node:
                    below += self.options(node["items"])
                elif part in node.get("properties", {}):
                    below += self.options(node["properties"][part])
                elif isinstance(node.get("additionalProperties"), dict):
                    below += self.options(node["additionalProperties"])
            nodes = below
        return " or ".join(dict.fromkeys(map(self.phrase, nodes)))

    def phrase(self, plain: Mapping[str, Any]) -> str:
        """A schema in words, such as "an integer of at least 1"."""
        if "const" in plain:
            return f"'{plain['const']}'"
        if "enum" in plain:
            return f"one of {', '.join(plain['enum'])}"
        kind = plain.get("type")
        if kind is None:
            return "anything"
        if kind in ("integer", "number"):
            return ("an integer" if kind == "integer" else "a number") + _range(plain)
        if kind == "array":
            entries = " or ".join(self.phrase(p) for p in self.options(plain["items"]))
            return f"a {'non-empty ' if plain.get('minItems') else ''}list (each entry {entries})"
        if kind == "object":
            filled = "non-empty " if plain.get("minProperties") else ""
            return f"a mapping with {', '.join(plain['properties'])}" if "properties" in plain else f"a {filled}mapping"
        return {"string": "non-empty text" if plain.get("minLength") else "text", "boolean": "true or false"}[kind]

    def closest(self, parts: Sequence[str]) -> str:
        """Suggests a key for an unknown one: the same name, another trainer's name for it, then the smallest edit distance."""
        *above, leaf = [part for part in parts if not part.isdecimal() and "." not in part] or parts
        section = "".join(f"{part}." for part in above)
        leaf = re.sub(r"(?<=[a-z])(?=[A-Z])|[-\s]", "_", leaf).lower()
        known = list(dict.fromkeys(self.known()))
        own = {
            k.removeprefix(section): k for k in known if k.startswith(section) and "." not in k.removeprefix(section)
        }
        near = [own[leaf]] if leaf in own else [k for k in known if k.rsplit(".", 1)[-1] == leaf]
        if not near and (hint := alias_hint(leaf)):
            return hint
        near = near or [own[m] for m in difflib.get_close_matches(leaf, own, n=1, cutoff=0.6)]
        near = near or [k for k in known if "".join(word[0] for word in k.rsplit(".", 1)[-1].split("_")) == leaf]  # lr
        leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
        near = near or [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
        return f"did you mean {near[0]}?" if near else "remove it; docs/run-file.md lists all keys"


def _range(plain: Mapping[str, Any]) -> str:
    """The limits of a number in words, from JSON schema's names or pydantic's."""

    def limit(*names: str) -> Any:
        return next((plain[name] for name in names if name in plain), None)

    least, above = limit("minimum", "ge"), limit("exclusiveMinimum", "gt")
    most, below = limit("maximum", "le"), limit("exclusiveMaximum", "lt")
    if least is not None and most is not None:
        return f" from {_format_number(least)} to {_format_number(most)}"
    low = (
        f"of at least {_format_number(least)}"
        if least is not None
        else f"above {_format_number(above)}"
        if above is not None
        else ""
    )
    high = (
        f"at most {_format_number(most)}"
        if most is not None
        else f"below {_format_number(below)}"
        if below is not None
        else ""
    )
    return f" {', '.join(words for words in (low, high) if words)}" if low or high else ""


def _format_number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"
