"""Pods of a Ray cluster as Pod Security's "restricted" wants them, sized by a layout. Plain trees; no run, no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftray.cluster.instance_types import PodLayout

Tree = dict[str, Any]

USER = 1000
HOME = "/home/ftray"
RUN_FILE = "/etc/ftray/run.yaml"
PART_OF = "ftray"
SECRETS = (
    "/var/run/secrets/ftray"  # Secrets are mounted as files below it: environments end up in logs and child processes
)
SECRET_MODE = 0o440
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
class RunImage:
    """Settings that all pods of one run share.

    Args:
        name: The container image.
        run: The run's Kubernetes name. Its ConfigMap, service account and Secrets are named after it.
        ray_version: The version of Ray in the image.
        head_gib: Memory of the head, in GiB.
        hub_roles: The roles whose pods download from the model hub, and so get its token.
    """

    name: str
    run: str
    ray_version: str
    head_gib: int
    hub_roles: frozenset[str] = frozenset()

    @property
    def ray_token(self) -> str:
        """Name of the Secret that holds the Ray token of this run's clusters, under `auth_token`."""
        return f"{self.run}-ray-token"


def head_group(image: RunImage, role: str, has_autoscaler: bool = False) -> Tree:
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
        "dashboard-host": "0.0.0.0",  # behind the token and the network policy; its service is ClusterIP  # nosec B104 # a pod, behind keys and network policies
        "metrics-export-port": "8080",
        "object-store-memory": str(HEAD_SHM_GIB * 2**30 * 3 // 4),
    }
    return {"serviceType": "ClusterIP", "rayStartParams": params, "template": pod}


def worker_group(
    image: RunImage, role: str, layout: PodLayout, pods: tuple[int, int, int], is_spread: bool = False
) -> Tree:
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


def submitter(image: RunImage) -> Tree:
    """The pod that hands the job to the cluster and follows its log."""
    size = {"cpu": "500m", "memory": "1Gi"}
    pod = _pod(image, "ray-job-submitter", "submit", size, 0)
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def _pod(image: RunImage, container: str, role: str, size: Tree, shm_gib: int) -> Tree:
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
    secret_env, secret_mounts, secret_volumes = _secrets(image, role)
    mounts += secret_mounts
    volumes += secret_volumes
    if shm_gib:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}})
    main = {
        "name": container,
        "image": image.name,
        "imagePullPolicy": "IfNotPresent",
        "env": [
            {"name": "HOME", "value": HOME},
            {"name": "RAY_AUTH_MODE", "value": "token"},
            *secret_env,
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
        ],
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
            "serviceAccountName": image.run,
            "automountServiceAccountToken": False,  # AWS's own token for the bucket is mounted besides
            "enableServiceLinks": False,
            "securityContext": SECURITY,
            "terminationGracePeriodSeconds": COMMIT_S,
            "containers": [main],
            "volumes": volumes,
        },
    }


def _secrets(image: RunImage, role: str) -> tuple[list[Tree], list[Tree], list[Tree]]:
    """Environment, mounts and volumes of the Secrets that a role needs, and no other.

    Every pod proves itself with the run's Ray token. Only endpoints get API keys. Only pods that download from the
    model hub get its token.
    """
    wanted = [("ray", "RAY_AUTH_TOKEN_PATH", image.ray_token, "auth_token", False)]
    if role == "serve":
        wanted.append(("api-keys", "FTRAY_API_KEY_FILE", f"{image.run}-api-keys", "keys", False))
    if role in image.hub_roles:
        wanted.append(("hub", "HF_TOKEN_PATH", f"{image.run}-hub-token", "token", True))
    env, mounts, volumes = [], [], []
    for volume, variable, secret, key, optional in wanted:
        directory = f"{SECRETS}/{volume}"
        source = {"secretName": secret, "defaultMode": SECRET_MODE, "optional": optional}
        env.append({"name": variable, "value": f"{directory}/{key}"})
        mounts.append({"name": f"secret-{volume}", "mountPath": directory, "readOnly": True})
        volumes.append({"name": f"secret-{volume}", "secret": source})
    return env, mounts, volumes
