"""How many workers the cluster can hold, by the resources of its nodes and the section `scale`."""

from __future__ import annotations

import ray

from ftray import config
from ftray.compat.ray import draining_nodes, free_resources
from ftray.errors import ConfigError

Resources = dict[str, float]


def check_resources(run: config.RunConfig) -> bool:
    """Whether workers use GPUs. Raises ConfigError if the cluster as it is can never hold the fewest workers."""
    nodes, scale = usable_nodes(), run.scale
    num_gpus, num_cpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("GPU", "CPU"))
    use_gpu = scale.accelerator is not None or num_gpus > 0
    if scale.accelerator is not None and not any(f"accelerator_type:{scale.accelerator}" in node for node in nodes):
        kinds = sorted({k.split(":")[1] for node in nodes for k in node if k.startswith("accelerator_type:")})
        raise ConfigError(
            f"scale.accelerator {scale.accelerator} is not in this cluster, which has {', '.join(kinds) or 'no GPU'}; "
            "correct it"
        )
    if run.train.precision == "fp16" and not use_gpu:
        raise ConfigError("train.precision fp16 needs GPUs, and the cluster has none; use bf16 or fp32")
    fewest = run.world_sizes[-1]
    if use_gpu and num_gpus < fewest * scale.gpus_per_worker:
        raise ConfigError(f"scale.num_workers ({fewest}) needs as many GPUs, the cluster has {int(num_gpus)}; lower it")
    needed = fewest * scale.cpus_per_worker
    if needed > num_cpus:
        raise ConfigError(
            f"scale needs {needed:g} CPUs (num_workers × cpus_per_worker), the cluster has {num_cpus:g}; lower one of them"
        )
    available = max_workers(scale, use_gpu, nodes)
    if available < fewest:
        raise ConfigError(
            f"scale needs {fewest} workers with {scale.cpus_per_worker:g} CPUs each on one node, and one CPU for reading data. "
            f"The cluster has {num_cpus:g} CPUs on {len(nodes)} nodes and can hold {available}; lower num_workers or "
            "cpus_per_worker"
        )
    return use_gpu


def usable_nodes() -> list[Resources]:
    """Total resources of each node that is alive and not about to be taken away."""
    leaving = draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def free_nodes() -> list[Resources]:
    """Free resources of each of these nodes."""
    leaving = draining_nodes()
    return [free for node_id, free in free_resources().items() if node_id not in leaving]


def max_workers(scale: config.ScaleConfig, use_gpu: bool, nodes: list[Resources]) -> int:
    """Workers that these nodes can hold at once: each on one node, with one CPU in total left for reading data."""
    if scale.accelerator is not None:
        nodes = [node for node in nodes if f"accelerator_type:{scale.accelerator}" in node]
    needs = {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if use_gpu else {})
    number = sum(min(int(node.get(kind, 0) / need + 1e-9) for kind, need in needs.items()) for node in nodes)
    num_cpus = sum(node.get("CPU", 0) for node in nodes)
    while number and number * scale.cpus_per_worker + 1 > num_cpus + 1e-9:
        number -= 1
    return number


def world_size_for(run: config.RunConfig, available: int) -> int | None:
    """The largest world size up to `available` that `scale.num_workers` allows and that divides the global batch."""
    return next((size for size in run.world_sizes if size <= available), None)
