"""Writes kuberay.json: KubeRay's custom resource definitions as JSON schemas that refuse unknown keys, small.

Descriptions go, and what occurs more than once (a pod template, thirteen times) is kept once.

    python tests/manifests/make_schemas.py <folder with ray.io_*.yaml of KubeRay 1.7>
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = ("rayclusters", "rayjobs", "rayservices", "raycronjobs")
WORTH_SHARING = 300  # characters


def main(folder: Path) -> None:
    """Writes the schemas of each kind's stored version beside this file."""
    shared: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for name in KINDS:
        tree = yaml.load((folder / f"ray.io_{name}.yaml").read_text(), yaml.CSafeLoader)["spec"]
        version = next(v for v in tree["versions"] if v["storage"])
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"].pop("status", None)
        kinds[f"ray.io/{version['name']}/{tree['names']['kind']}"] = _pointer(strict(schema), shared)
    text = json.dumps({"kinds": kinds, "$defs": shared}, separators=(",", ":"), sort_keys=True)
    (Path(__file__).parent / "kuberay.json").write_text(text + "\n")


def strict(node: Any) -> Any:
    """A schema without descriptions and Kubernetes' own words, in which a key that isn't named is refused."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {}
    for key, value in node.items():
        if key == "properties":
            found[key] = {name: strict(below) for name, below in value.items()}
        elif key not in ("description", "default", "format") and not key.startswith("x-kubernetes"):
            found[key] = strict(value)
    if "properties" in found and "additionalProperties" not in found:
        found["additionalProperties"] = bool(node.get("x-kubernetes-preserve-unknown-fields", False))
    return found


def _pointer(node: Any, shared: dict[str, Any]) -> Any:
    """The node with everything large in it moved to `shared`, under its hash."""
    if isinstance(node, list):
        return [_pointer(item, shared) for item in node]
    if not isinstance(node, dict):
        return node
    small = {key: _pointer(value, shared) for key, value in node.items()}
    is_schema = isinstance(small.get("type"), str) and ("properties" in small or "items" in small)
    text = json.dumps(small, sort_keys=True)
    if not is_schema or len(text) < WORTH_SHARING:
        return small
    name = hashlib.sha256(text.encode()).hexdigest()[:10]
    shared[name] = small
    return {"$ref": f"#/$defs/{name}"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
