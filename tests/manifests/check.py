"""Checks of Kubernetes manifests without a cluster: schemas that refuse unknown keys, and Pod Security "restricted".

Kubernetes' own kinds by the schemas that the package kubernetes-validate carries, KubeRay's by kuberay.json (make_schemas),
Kueue's and Prometheus' by the keys that we use. Knows nothing of ftray.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
from referencing import Registry, Resource

KUBERNETES = "v1.34.0-local-strict"
Tree = dict[str, Any]

_NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"}


def _keys(required: tuple[str, ...] = (), **keys: Any) -> Tree:
    return {"type": "object", "properties": keys, "required": list(required), "additionalProperties": False}


_TEXT, _SELECTOR = {"type": "string"}, _keys(matchLabels={"type": "object", "additionalProperties": {"type": "string"}})
_QUOTA = _keys(("name", "nominalQuota"), name=_TEXT, nominalQuota={"type": ["string", "integer"]})
_FLAVOR = _keys(("name", "resources"), name=_TEXT, resources={"type": "array", "items": _QUOTA})
_GROUP = _keys(
    ("coveredResources", "flavors"),
    coveredResources={"type": "array", "items": _TEXT},
    flavors={"type": "array", "items": _FLAVOR},
)
OTHERS: dict[str, Tree] = {
    "kueue.x-k8s.io/v1beta1/ResourceFlavor": _keys(),
    "kueue.x-k8s.io/v1beta1/ClusterQueue": _keys(
        namespaceSelector=_SELECTOR, resourceGroups={"type": "array", "items": _GROUP}
    ),
    "kueue.x-k8s.io/v1beta1/LocalQueue": _keys(("clusterQueue",), clusterQueue=_NAME),
    "monitoring.coreos.com/v1/PodMonitor": _keys(
        ("selector", "podMetricsEndpoints"),
        selector=_SELECTOR,
        podTargetLabels={"type": "array", "items": _TEXT},
        podMetricsEndpoints={
            "type": "array",
            "items": _keys(("port",), port=_TEXT, path=_TEXT, interval={"type": "string", "pattern": "^[0-9]+s$"}),
        },
    ),
}


def problems(manifest: Tree) -> list[str]:
    """What a manifest has that its kind doesn't know, or lacks: `path: sentence`. [] for a sound one."""
    kind = f"{manifest['apiVersion']}/{manifest['kind']}"
    if kind in _kuberay()["kinds"]:
        schema: Tree = {**_kuberay()["kinds"][kind], "$defs": _kuberay()["$defs"]}
        errors = [*_errors(schema, manifest), *_metadata(manifest.get("metadata", {}))]
        for path, template in pod_templates(manifest):
            errors += [f"{path}.{error}" for error in _metadata(template.get("metadata", {}))]
        return errors + _rules(manifest)
    if kind in OTHERS:
        whole = _keys(("spec",), apiVersion=_TEXT, kind=_TEXT, metadata={"type": "object"}, spec=OTHERS[kind])
        return [*_errors(whole, manifest), *_metadata(manifest.get("metadata", {}))]
    group, _, version = manifest["apiVersion"].rpartition("/")
    name = "-".join(part for part in (manifest["kind"].lower(), group.split(".")[0], version) if part)
    return _errors(_kubernetes(name), manifest)


def _errors(schema: Tree, tree: Tree) -> list[str]:
    registry: Registry[Any] = Resource.from_contents(_kubernetes("_definitions")) @ Registry()
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in validator.iter_errors(tree)
    ]


def _metadata(tree: Tree) -> list[str]:
    return [f"metadata.{error}" for error in _errors(_kubernetes("objectmeta-meta-v1"), tree)]


def _rules(manifest: Tree) -> list[str]:
    """What KubeRay's operator refuses although its schema doesn't."""
    spec = manifest["spec"]
    if manifest["kind"] == "RayCronJob":
        spec = spec["jobTemplate"]
    found = []
    if spec.get("deletionStrategy") and (spec.get("shutdownAfterJobFinishes") or spec.get("ttlSecondsAfterFinished")):
        found.append("spec: deletionRules and shutdownAfterJobFinishes exclude each other")
    if "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {}) and not spec.get(
        "shutdownAfterJobFinishes"
    ):
        found.append("spec: Kueue wants shutdownAfterJobFinishes")
    if len(manifest["metadata"].get("name", "")) > 47:
        found.append("metadata.name: longer than the 47 characters that KubeRay takes")
    return found


@functools.cache
def _kuberay() -> Tree:
    return json.loads((Path(__file__).parent / "kuberay.json").read_text())


@functools.cache
def _kubernetes(name: str) -> Tree:
    text = files("kubernetes_validate").joinpath(f"kubernetes-json-schema/{KUBERNETES}/{name}.json").read_text()
    return json.loads(text)


def pod_templates(node: Any, path: str = "") -> Iterator[tuple[str, Tree]]:
    """Every pod template in a manifest, with its path."""
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from pod_templates(item, f"{path}.{number}")
    elif isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, dict) and isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
                yield f"{path}.{key}".lstrip("."), value
            else:
                yield from pod_templates(value, f"{path}.{key}")


def unrestricted(manifest: Tree) -> list[str]:
    """What Pod Security "restricted" refuses, and what we want besides: a root that can't be written, no token."""
    found = []
    for path, template in pod_templates(manifest):
        pod = template["spec"]
        context = pod.get("securityContext", {})
        found += [f"{path}: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
        allowed = {
            "configMap",
            "emptyDir",
            "secret",
            "projected",
            "persistentVolumeClaim",
            "downwardAPI",
            "ephemeral",
            "csi",
        }
        found += [f"{path}: volume {v['name']}" for v in pod.get("volumes", []) if not (set(v) - {"name"}) <= allowed]
        if context.get("runAsUser") == 0:
            found.append(f"{path}: runAsUser 0")
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            found += [
                f"{path}/{container['name']}: {wrong}"
                for wrong in _container(container.get("securityContext", {}), context)
            ]
            if any("hostPort" in port for port in container.get("ports", [])):
                found.append(f"{path}/{container['name']}: hostPort")
        if pod.get("automountServiceAccountToken") is not False and "autoscalerOptions" not in json.dumps(manifest):
            found.append(f"{path}: automountServiceAccountToken")
    options = _find(manifest, "autoscalerOptions")
    if options is not None:
        found += [f"autoscalerOptions: {wrong}" for wrong in _container(options.get("securityContext", {}), {})]
    return found


def _container(own: Tree, pod: Tree) -> list[str]:
    both = {**pod, **own}
    wanted = {
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "privileged": not own.get("privileged"),
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        "runAsNonRoot": both.get("runAsNonRoot") is True,
        "runAsUser": own.get("runAsUser") != 0,
        "capabilities": own.get("capabilities") == {"drop": ["ALL"]},
        "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
    }
    return [key for key, holds in wanted.items() if not holds]


def _find(node: Any, key: str) -> Any:
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and key in node:
        return node[key]
    return next((hit for item in below if (hit := _find(item, key)) is not None), None)


def secrets_of(template: Tree) -> dict[str, str]:
    """Environment variable → Secret, for each Secret that a pod mounts as a file. No pod reads one into its environment."""
    (container,) = template["spec"]["containers"]
    assert not [v["name"] for v in container["env"] if "valueFrom" in v]
    volumes = {v["name"]: v["secret"] for v in template["spec"]["volumes"] if "secret" in v}
    directories = {m["mountPath"]: m["name"] for m in container["volumeMounts"] if m["name"] in volumes}
    assert all(volume["defaultMode"] == 0o440 for volume in volumes.values())
    assert sorted(directories.values()) == sorted(volumes)
    values = {v["name"]: Path(v["value"]) for v in container["env"]}
    return {
        name: volumes[directories[str(path.parent)]]["secretName"]
        for name, path in values.items()
        if str(path.parent) in directories
    }


def ray_pods(manifest: Tree) -> list[Tree]:
    return [template for _, template in pod_templates(manifest) if "ftray/run" in template["metadata"]["labels"]]
