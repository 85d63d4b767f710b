"""From YAML text to a tree of plain values, and from pydantic's complaints to sentences. Knows no key of a run."""

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

MAX_YAML_CHARS = 1 << 16  # a run file has a few thousand; PyYAML reads as many in a second or two
MAX_YAML_SIZE = (
    100_000  # values of a file with its aliases written out; CHARS_PER_VALUE characters of text count as one
)
CHARS_PER_VALUE = 16
MAX_NUMBER_CHARS = 100
MAX_COMPLAINTS = 100


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses what is settled silently (a key given twice) or without bounds (aliases of aliases)."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_expanded(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_NUMBER_CHARS:
            problem = f"a number of {len(node.value)} digits is more than any key takes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_yaml_int(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _check_expanded(root: yaml.Node) -> None:
    """Refuses a document that is too large once its aliases are written out, or that holds itself.

    Whoever walks the values walks an aliased one as often as it is named, so nine levels of nine aliases are a billion.
    The nodes themselves are few: each is counted once, after those below it.
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
                raise yaml.MarkedYAMLError(problem="an alias names what it is part of", problem_mark=node.start_mark)
            open_nodes.add(id(node))
            waiting.append((node, True))
            waiting += [(child, False) for child in children if id(child) not in sizes]
            continue
        own = 1 + (len(node.value) // CHARS_PER_VALUE if isinstance(node, yaml.ScalarNode) else 0)
        sizes[id(node)] = own + sum(sizes[id(child)] for child in children)
        open_nodes.discard(id(node))
        if sizes[id(node)] > MAX_YAML_SIZE:
            problem = f"with its aliases written out this holds more than {MAX_YAML_SIZE} values"
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
        raise ConfigError(f"{path} does not exist; give the path of a run file such as jobs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} can't be read ({err}); give the path of a YAML text file") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys; a run file is a mapping with at least name, model and data")
    return tree


def parse_yaml(text: str, origin: str) -> Any:
    """Plain values of a YAML text, which may be a stranger's. origin: what it is, for messages. Raises ConfigError."""
    if len(text) > MAX_YAML_CHARS:
        raise ConfigError(f"{origin} has more than {MAX_YAML_CHARS} characters; give the path of a run file")
    try:
        return yaml.load(text, _StrictLoader)  # nosec B506 # a safe loader without anchors that expand
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        place = f"{origin}, line {mark.line + 1}, column {mark.column + 1}" if mark else origin
        raise ConfigError(f"{place}: {_clip(err.problem)}; correct the YAML there") from None
    except yaml.YAMLError as err:
        raise ConfigError(f"{origin} is not YAML: {_clip(err)}; write it anew") from None
    except Exception as err:  # noqa: BLE001 - nested thousands deep, a date such as 2024-13-45, `!!bool x`: a KeyError
        raise ConfigError(f"{origin} can't be read: {_clip(err)}; correct the YAML there") from None


def _clip(problem: object) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Applies `a.b.0.c=value` to the tree in place; the value is read as YAML. Raises ConfigError."""
    key, sign, value = text.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise ConfigError(f"'{text}' is not an override; write key.sub=value, for example train.max_steps=10")
    put_value(tree, key, parse_yaml(value, f"override {key}"))


def put_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of the tree in place, making the mappings above it. Raises ConfigError."""
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
                f"{key}: {'.'.join(parts[: depth + 1])} holds {_shown(below)} and no keys; override it whole"
            )
        node[place] = copy.copy(below)  # the file may name one mapping in two places (&anchor, *alias)
        node = node[place]


def _place_in_list(node: list[Any], part: str, key: str, above: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    remedy = f"use 0 to {len(node) - 1}" if node else f"override {above} whole"
    raise ConfigError(f"{key}: '{part}' is not a place in {above}, a list of {len(node)}; {remedy}")


def explain(err: ValidationError, root: type[BaseModel], tree: Mapping[str, Any]) -> list[str]:
    """One sentence for each wrong key of the tree: dotted key, value, what it must be, remedy."""
    schema = Schema(root)
    complaints: dict[tuple[str, ...], list[Any]] = {}
    errors = err.errors()
    for item in errors[:MAX_COMPLAINTS]:
        complaints.setdefault(_written_key(item, tree), []).append(item)
    # Of a key that may be several things, pydantic complains for each; what is wrong further down says which was meant.
    sentences = [
        _sentence(parts, items, schema)
        for parts, items in complaints.items()
        if not any(other[: len(parts)] == parts and other != parts for other in complaints) or not parts
    ]
    more = len(errors) - MAX_COMPLAINTS
    return [*sentences, f"and {more} more; correct these first"] if more > 0 else sentences


def _written_key(item: Any, tree: Any) -> tuple[str, ...]:
    """The parts of a dotted key as the user wrote them: pydantic's location also names the members of unions. A name in
    a mapping is one part, and may hold dots."""
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
    items = sorted(items, key=lambda item: item["type"] != "value_error")  # our own words say more than a type's
    kind, value, context = items[0]["type"], items[0].get("input"), items[0].get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key}; {schema.closest(parts)}"
    if kind == "missing":
        return f"the key {key} is missing; add it"
    if kind == "invalid_key":
        return f"the key {key} is no name; write it as text, or remove it"
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
            return f"{key}{shown} must be {words} {_number(context[name])}"
    quoted = "; put it in quotes" if kind == "string_type" and not isinstance(value, (dict, list, type(None))) else ""
    return f"{key}{shown} must be {schema.expected(parts)}{quoted}"


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # YAML can write a list that holds itself
        text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Schema:
    """What a section of the run file may hold, in words: for messages and for the reference page."""

    def __init__(self, root: type[BaseModel]) -> None:
        self.tree = root.model_json_schema()

    def options(self, node: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The plain schemas that a value may follow; null is left out."""
        if "$ref" in node:
            return self.options(self.tree["$defs"][node["$ref"].rsplit("/", 1)[-1]])
        if "anyOf" in node:
            return [plain for member in node["anyOf"] for plain in self.options(member)]
        return [] if node.get("type") == "null" else [dict(node)]

    def sections(self, node: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The groups of keys that a value may be, or a list or mapping of them."""
        found = []
        for plain in self.options(node):
            if plain.get("type") == "array":
                found += self.sections(plain["items"])
            elif isinstance(plain.get("additionalProperties"), dict):
                found += self.sections(plain["additionalProperties"])
            elif "properties" in plain:
                found.append(plain)
        return found

    def known(self, node: Mapping[str, Any] | None = None, prefix: str = "") -> Iterator[str]:
        """All dotted keys, those of list entries without a number, those of a mapping's values without a name."""
        for section in self.sections(node or self.tree):
            for name, below in section["properties"].items():
                yield prefix + name
                yield from self.known(below, f"{prefix}{name}.")

    def expected(self, parts: Sequence[str]) -> str:
        """What a key must be, for the parts of a key that the schema knows."""
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
        """A plain schema in words, such as "a whole number from 1 up"."""
        if "const" in plain:
            return f"'{plain['const']}'"
        if "enum" in plain:
            return f"one of {', '.join(plain['enum'])}"
        kind = plain.get("type")
        if kind is None:
            return "anything"
        if kind in ("integer", "number"):
            return ("a whole number" if kind == "integer" else "a number") + _range(plain)
        if kind == "array":
            entries = " or ".join(self.phrase(p) for p in self.options(plain["items"]))
            return f"a list{' with something in it' if plain.get('minItems') else ''} (each entry {entries})"
        if kind == "object":
            filled = " with something in it" if plain.get("minProperties") else ""
            return f"a mapping with {', '.join(plain['properties'])}" if "properties" in plain else f"a mapping{filled}"
        return {"string": "text that isn't empty" if plain.get("minLength") else "text", "boolean": "true or false"}[
            kind
        ]

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
        return f"did you mean {near[0]}?" if near else "remove it; the keys are listed in docs/run-file.md"


def _range(plain: Mapping[str, Any]) -> str:
    """The limits of a number in words; pydantic writes them by JSON schema's names or by its own."""

    def limit(*names: str) -> Any:
        return next((plain[name] for name in names if name in plain), None)

    least, above = limit("minimum", "ge"), limit("exclusiveMinimum", "gt")
    most, below = limit("maximum", "le"), limit("exclusiveMaximum", "lt")
    if least is not None and most is not None:
        return f" from {_number(least)} to {_number(most)}"
    low = f"from {_number(least)} up" if least is not None else f"above {_number(above)}" if above is not None else ""
    high = f"at most {_number(most)}" if most is not None else f"below {_number(below)}" if below is not None else ""
    return f" {', '.join(words for words in (low, high) if words)}" if low or high else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"
