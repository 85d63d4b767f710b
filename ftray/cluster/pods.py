"""Pods of a Ray cluster as Pod Security's "restricted" wants them, sized by a layout. Plain trees; no run, no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftray.cluster.nodes import Layout

Tree = dict[str, Any]

USER = 1000
HOME = "/home/ftray"
RUN_FILE = "/etc/ftray/run.yaml"
PART_OF = "ftray"
RAY_TOKEN = "ftray-ray-token"  # Secrets: Ray's token, the endpoint's keys, the model hub's token
API_KEYS = "ftray-api-keys"
HUB_TOKEN = "ftray-hub-token"
SERVICE_ACCOUNT = "ftray"
HEAD_CPUS, HEAD_SHM_GIB = 4, 4
COMMIT_S = 120  # seconds that a pod which is told to go has to commit a checkpoint

SECURITY: Tree = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Tree = {
    "allowPrivilegeEscalation": False,
    "privileged": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class Image:
    """What pods are made of. name: the image; run: the run's Kubernetes name, whose ConfigMap holds the run file;
    head_gib: memory of the head."""

    name: str
    run: str
    ray_version: str
    head_gib: int


def head_group(image: Image, role: str, has_autoscaler: bool = False) -> Tree:
    """The head: it carries the driver, and no worker. role: for labels: train, serve, cluster."""
    size = {"cpu": str(HEAD_CPUS), "memory": f"{image.head_gib}Gi"}
    pod = _pod(image, "ray-head", role, size, HEAD_SHM_GIB)
    pod["spec"]["containers"][0]["ports"] = [
        {"containerPort": 6379, "name": "gcs"},
        {"containerPort": 8265, "name": "dashboard"},
        {"containerPort": 10001, "name": "client"},
        {"containerPort": 8000, "name": "serve"},
        {"containerPort": 8080, "name": "metrics"},
    ]
    pod["spec"]["containers"][0]["env"].append({"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(COMMIT_S)})
    if has_autoscaler:  # the autoscaler beside the head asks Kubernetes for pods
        pod["spec"]["automountServiceAccountToken"] = True
    params = {
        "num-cpus": "0",
        "dashboard-host": "0.0.0.0",  # behind the token and the network policy; its service is ClusterIP
        "metrics-export-port": "8080",
        "object-store-memory": str(HEAD_SHM_GIB * 2**30 * 3 // 4),
    }
    return {"serviceType": "ClusterIP", "rayStartParams": params, "template": pod}


def worker_group(image: Image, role: str, layout: Layout, pods: tuple[int, int, int], is_spread: bool = False) -> Tree:
    """Workers. pods: how many at first, at least, at most. is_spread: they speak to each other over EFA, if there is."""
    machine = layout.machine
    size = {"cpu": str(layout.cpus), "memory": f"{layout.memory_gib}Gi"}
    if layout.gpus:
        size["nvidia.com/gpu"] = str(layout.gpus)
    efa = machine.efa * layout.gpus // machine.gpus if is_spread and layout.gpus else 0
    if efa:
        size |= {"vpc.amazonaws.com/efa": str(efa), "hugepages-2Mi": "5120Mi"}
    pod = _pod(image, "ray-worker", role, size, layout.shm_gib)
    spec = pod["spec"]
    spec["containers"][0]["ports"] = [
        {"containerPort": 8000, "name": "serve"},
        {"containerPort": 8080, "name": "metrics"},
    ]
    if layout.gpus:
        spec["nodeSelector"] = {"node.kubernetes.io/instance-type": machine.name}
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if efa:
        spec["containers"][0]["env"] += nccl_env()
    replicas, least, most = pods
    return {
        "groupName": "workers",
        "replicas": replicas,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {"metrics-export-port": "8080", "object-store-memory": str(layout.object_store_bytes)},
        "template": pod,
    }


def nccl_env() -> list[Tree]:
    """What NCCL needs to speak over EFA; RDMA between GPUs as p4d and later have it."""
    values = {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "NCCL_SOCKET_IFNAME": "eth0"}
    return [{"name": name, "value": value} for name, value in values.items()]


def submitter(image: Image) -> Tree:
    """The pod that hands the job to the cluster and follows its log."""
    size = {"cpu": "500m", "memory": "1Gi"}
    pod = _pod(image, "ray-job-submitter", "submit", size, 0)
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def _pod(image: Image, container: str, role: str, size: Tree, shm_gib: int) -> Tree:
    mounts = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "home", "mountPath": HOME},
        {"name": "run", "mountPath": "/etc/ftray", "readOnly": True},
    ]
    volumes: list[Tree] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
        {"name": "run", "configMap": {"name": image.run} | ({"optional": True} if role == "cluster" else {})},
    ]
    if shm_gib:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}})
    main = {
        "name": container,
        "image": image.name,
        "imagePullPolicy": "IfNotPresent",
        "env": _env(),
        "resources": {"requests": size, "limits": size},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }
    return {
        "metadata": {
            "labels": {
                "app.kubernetes.io/part-of": PART_OF,
                "app.kubernetes.io/component": role,
                "ftray/run": image.run,
            }
        },
        "spec": {
            "serviceAccountName": SERVICE_ACCOUNT,
            "automountServiceAccountToken": False,  # AWS's own token for the bucket is mounted besides
            "enableServiceLinks": False,
            "securityContext": SECURITY,
            "terminationGracePeriodSeconds": COMMIT_S,
            "containers": [main],
            "volumes": volumes,
        },
    }


def _env() -> list[Tree]:
    def secret(variable: str, name: str, key: str, optional: bool) -> Tree:
        return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key, "optional": optional}}}

    return [
        {"name": "HOME", "value": HOME},
        {"name": "RAY_AUTH_MODE", "value": "token"},
        secret("RAY_AUTH_TOKEN", RAY_TOKEN, "auth_token", optional=False),
        secret("FTRAY_API_KEY", API_KEYS, "keys", optional=True),
        secret("HF_TOKEN", HUB_TOKEN, "token", optional=True),
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
    ]
