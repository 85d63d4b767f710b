"""Kubernetes manifests of a run, for KubeRay 1.7: run file, access, a RayJob that trains, a RayService that serves.

Pure: trees from a run file. Two runs share no token, key, service account or network policy of their own. What all
runs of a namespace share (deny-by-default, DNS, TLS to the outside, metrics) is in k8s/base and docs/clusters.md.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import re
from pathlib import Path
from typing import Any

import yaml

from ftray import config
from ftray.cluster.instance_types import PodLayout, find_instance_type, plan_pods
from ftray.cluster.pod_spec import (
    CONTAINER_SECURITY,
    PART_OF,
    RUN_FILE,
    RunImage,
    Tree,
    head_group,
    submitter,
    worker_group,
)
from ftray.cluster.uri_check import check_pods, reads_hub
from ftray.errors import ConfigError

ACCESS_PARTS = ("serviceaccount", "networkpolicy", "pdb-train", "pdb-serve")
PARTS = ("configmap", *ACCESS_PARTS, "rayjob", "rayservice", "raycluster")
DEFAULT_PARTS = PARTS[:-1]
NAME_CHARS = 40  # KubeRay adds to a name, and a label holds 63
START_S, MOST_S = 3600, 14 * 86400
RETRIES = 3


def render(
    run: config.RunConfig,
    machine_name: str | None = None,
    image: str | None = None,
    parts: tuple[str, ...] = DEFAULT_PARTS,
    role_arn: str | None = None,
) -> dict[str, Tree]:
    """Renders the manifests of a run.

    Args:
        run: The run.
        machine_name: The instance type, or None for the default type of `scale.accelerator`.
        image: The container image, or None for the one that cluster/Dockerfile builds.
        parts: Which of PARTS to render.
        role_arn: The AWS role that pods of this run assume, for the service account's annotation.

    Returns:
        One manifest per part, by the part's name.

    Raises:
        ConfigError: These machines or pods cannot carry the run.
    """
    check_pods(run)
    if "rayservice" in parts and run.method.type == "prompt-tuning":
        parts = tuple(part for part in parts if part not in ("rayservice", "pdb-serve"))  # only PEFT serves these
    layout = plan_pods(run, find_instance_type(run.scale.accelerator, machine_name))
    kind = "cuda" if layout.gpus else "cpu"
    made = RunImage(
        image or f"ftray:{importlib.metadata.version('ftray')}-{kind}",
        kubernetes_name(run.name),
        importlib.metadata.version("ray"),
        head_gib(run),
        hub_roles(run),
    )
    manifests = {part: _MAKERS[part](run, layout, made) for part in parts}
    if role_arn and "serviceaccount" in manifests:
        manifests["serviceaccount"]["metadata"]["annotations"] = {"eks.amazonaws.com/role-arn": role_arn}
    return manifests


def hub_roles(run: config.RunConfig) -> frozenset[str]:
    """The roles whose pods may download from the model hub: none where neither base nor data comes from it.

    A submitter never does, and an endpoint serves what the run exported to its storage.
    """
    return frozenset({"train", "cluster"} if reads_hub(run) else {"cluster"})


def as_yaml(tree: Tree) -> str:
    """A manifest as text, without YAML's anchors."""
    return yaml.dump(tree, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)


def write(manifests: dict[str, Tree], directory: Path) -> list[Path]:
    """Writes a file for each manifest, and a kustomization that names them; returns the paths. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for part, tree in manifests.items():
            paths.append(directory / f"{part}.yaml")
            paths[-1].write_text(as_yaml(tree), encoding="utf-8")
        listing = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [path.name for path in paths],
        }
        paths.append(directory / "kustomization.yaml")
        paths[-1].write_text(as_yaml(listing), encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"-o {directory} can't be written ({err.strerror}); name another directory") from None
    return paths


def head_gib(run: config.RunConfig) -> int:
    """Memory of the head, whose driver merges and writes the model: 3 bytes for each weight that the base's name tells."""
    size = re.search(r"(\d+(?:\.\d+)?)b\b", run.model.base.lower())
    return 16 + math.ceil(3e9 * float(size[1]) / 2**30) if size else 16


def kubernetes_name(name: str) -> str:
    """A run's name as Kubernetes allows it. Two runs never share one: what had to be changed carries a hash."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    if plain == name and len(name) <= NAME_CHARS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{plain[: NAME_CHARS - 7].strip('-') or 'run'}-{digest}"


def _configmap(run: config.RunConfig, _: PodLayout, image: RunImage) -> Tree:
    tree = run.model_dump(mode="json", exclude_unset=True)
    tree.setdefault("serve", {})["host"] = "0.0.0.0"  # of a pod; keys and the network policy guard it  # nosec B104 # a pod, behind keys and network policies
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _meta(run, image), "data": {"run.yaml": as_yaml(tree)}}


def _rayjob(run: config.RunConfig, layout: PodLayout, image: RunImage) -> Tree:
    spec = {
        "entrypoint": f"ftray run {RUN_FILE}",
        "metadata": {"run": run.name, "config_hash": run.config_hash},
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter(image),
        "backoffLimit": RETRIES,  # a new cluster each time; the run continues by its name from its newest checkpoint
        "preRunningDeadlineSeconds": START_S,
        "activeDeadlineSeconds": MOST_S,
        "deletionStrategy": {
            "deletionRules": [
                {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}},
                {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}},
                {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 86400}},
                {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 7 * 86400}},
            ]
        },
        "rayClusterSpec": _cluster(
            image, head_group(image, "train"), [_training_workers(image, layout, "train", layout.pods)]
        ),
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _meta(run, image), "spec": spec}


def _raycluster(run: config.RunConfig, layout: PodLayout, image: RunImage) -> Tree:
    """A cluster that stays, for `ftray submit`. Its workers stay too: what can't hold a run refuses it."""
    group = _training_workers(image, layout, "cluster", layout.pods)
    spec = _cluster(image, head_group(image, "cluster"), [group])
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": _meta(run, image), "spec": spec}


def _training_workers(image: RunImage, layout: PodLayout, role: str, pods: int) -> Tree:
    return worker_group(image, role, layout, (pods, layout.min_pods, pods), is_spread=pods > 1)


def _rayservice(run: config.RunConfig, layout: PodLayout, image: RunImage) -> Tree:
    least, most = run.serve.min_replicas, run.serve.max_replicas
    replica = plan_pods(run.model_copy(update={"scale": _one_replica(run)}), layout.machine)
    if replica.pods != 1:
        raise ConfigError(
            f"serve.tensor_parallel is {run.serve.tensor_parallel}, more GPUs than one machine gives a replica "
            f"({layout.machine.name}); lower it, or name a larger machine"
        )
    group = worker_group(image, "serve", replica, (least, least, most))
    application = {
        "name": "ftray",
        "route_prefix": "/",
        "import_path": "ftray.serve.deploy:build",
        "args": {"run": RUN_FILE},
    }
    served = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000, "request_timeout_s": run.serve.proxy_timeout_s},  # nosec B104 # a pod, behind keys and network policies
        "applications": [application],
    }
    cluster = _cluster(image, head_group(image, "serve", has_autoscaler=most > least), [group])
    if most > least:
        cluster["enableInTreeAutoscaling"] = True
        cluster["autoscalerOptions"] = {
            "idleTimeoutSeconds": 300,
            "securityContext": CONTAINER_SECURITY,
            "resources": {
                "requests": {"cpu": "500m", "memory": "1Gi"},
                "limits": {"cpu": "500m", "memory": "1Gi"},
            },
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": "/home/ftray"}],
        }
    spec = {
        "serviceUnhealthySecondThreshold": 900,
        "deploymentUnhealthySecondThreshold": 300,
        "excludeHeadPodFromServeSvc": True,
        "upgradeStrategy": {"type": "NewCluster"},  # a new cluster takes over once it answers
        "rayClusterDeletionDelaySeconds": 700,  # longer than the longest answer: no stream is cut
        "serveConfigV2": as_yaml(served),
        "rayClusterConfig": cluster,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": _meta(run, image), "spec": spec}


def _one_replica(run: config.RunConfig) -> config.ScaleConfig:
    return run.scale.model_copy(update={"num_workers": run.serve.tensor_parallel})


def _cluster(image: RunImage, head: Tree, workers: list[Tree]) -> Tree:
    return {
        "rayVersion": image.ray_version,
        "authOptions": {"mode": "token", "secretName": image.ray_token},
        "enableInTreeAutoscaling": False,
        "headGroupSpec": head,
        "workerGroupSpecs": workers,
    }


def _labels(image: RunImage) -> Tree:
    return {"app.kubernetes.io/name": "ftray", "app.kubernetes.io/part-of": PART_OF, "ftray/run": image.run}


def _meta(run: config.RunConfig, image: RunImage) -> Tree:
    return {
        "name": image.run,
        "labels": _labels(image),
        "annotations": {"ftray/config-hash": run.config_hash},
    }


def _service_account(_run: config.RunConfig, _layout: PodLayout, image: RunImage) -> Tree:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": image.run, "labels": _labels(image)},
        "automountServiceAccountToken": False,
    }


def _network_policy(_run: config.RunConfig, _layout: PodLayout, image: RunImage) -> Tree:
    """Ray and NCCL use many ports: all are open between the pods of this run, and closed to every other pod."""
    pods = {"matchLabels": {"app.kubernetes.io/part-of": PART_OF, "ftray/run": image.run}}
    spec = {
        "podSelector": pods,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": pods}]}],
        "egress": [{"to": [{"podSelector": pods}]}],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{image.run}-within", "labels": _labels(image)},
        "spec": spec,
    }


def _disruption_budget(image: RunImage, role: str, node_type: str) -> Tree:
    labels = {"ftray/run": image.run, "app.kubernetes.io/component": role, "ray.io/node-type": node_type}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{image.run}-{role}", "labels": _labels(image)},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": labels}},
    }


def _pdb_train(_run: config.RunConfig, _layout: PodLayout, image: RunImage) -> Tree:
    """The head carries the driver of the run, so a drain does not evict it."""
    return _disruption_budget(image, "train", "head")


def _pdb_serve(_run: config.RunConfig, _layout: PodLayout, image: RunImage) -> Tree:
    """A drain evicts replicas one at a time, and never the last."""
    return _disruption_budget(image, "serve", "worker")


_MAKERS = {
    "configmap": _configmap,
    "serviceaccount": _service_account,
    "networkpolicy": _network_policy,
    "pdb-train": _pdb_train,
    "pdb-serve": _pdb_serve,
    "rayjob": _rayjob,
    "rayservice": _rayservice,
    "raycluster": _raycluster,
}


class _Plain(yaml.SafeDumper):
    """Writes equal parts out each time, and text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Plain.add_representer(str, _text)
