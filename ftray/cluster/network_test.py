"""How fast machines reach each other: one all-reduce over all of them, as training does it. A Ray task on each.

`reduce_speed` is one rank's part and knows only torch.distributed; `measure_links` brings the ranks together.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta
from typing import Any

from ftray.cluster.doctor import HealthCheck
from ftray.network import use_interface_to

SIZE_BYTES = {"nccl": 512 * 2**20, "gloo": 32 * 2**20}
ROUNDS = 5
SLOW_GB_S = {"nccl": 2.0, "gloo": 0.05}  # of one GPU a machine, or of one process; EFA gives over 10, a plain card 1
PATIENCE_S = 120.0
REMEDY = {
    "nccl": "see with NCCL_DEBUG=INFO whether EFA is used; one placement group; a security group that allows itself",
    "gloo": "put the nodes into one network",
}


def reduce_speed(rank: int, world_size: int, address: str, backend: str, size_bytes: int | None = None) -> float:
    """This rank's part of ROUNDS all-reduces; GB/s of the bus: 2 (n - 1) / n × bytes / seconds, as NCCL's tests count.

    address: host:port of rank 0. Collective. Raises RuntimeError where ranks don't find each other.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda" if backend == "nccl" else "cpu")
    use_interface_to(address.rpartition(":")[0].strip("[]"))
    number = (size_bytes or SIZE_BYTES[backend]) // 4
    dist.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE_S)
    )
    try:
        tensor = torch.ones(number, device=device)
        dist.all_reduce(tensor)  # connections are made at the first
        if not torch.all(tensor == world_size):
            raise RuntimeError("the all-reduce gave a wrong sum")
        _settle(device)
        began = time.monotonic()
        for _ in range(ROUNDS):
            dist.all_reduce(tensor)
        _settle(device)
        seconds = (time.monotonic() - began) / ROUNDS
    finally:
        dist.destroy_process_group()
    return 2 * (world_size - 1) / world_size * number * 4 / seconds / 1e9


def _settle(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def open_port() -> str:
    """host:port of this machine where nobody listens now, as the other machines reach it."""
    import ray

    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{sock.getsockname()[1]}"


def measure_links() -> HealthCheck:
    """One rank on each node that carries workers: by NCCL where all have a GPU that is free, else by gloo."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if len(nodes) < 2:
        return HealthCheck("links", "ok", "one node carries workers")
    backend = "nccl" if all(node["Resources"].get("GPU", 0) for node in nodes) else "gloo"
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1 if backend == "nccl" else 0, "max_retries": 0}
    try:
        there = ray.remote(open_port).options(num_cpus=0, scheduling_strategy=places[0])
        address = ray.get(there.remote(), timeout=PATIENCE_S)
        ranks = [
            ray.remote(reduce_speed)
            .options(**options, scheduling_strategy=place)
            .remote(rank, len(nodes), address, backend)
            for rank, place in enumerate(places)
        ]
        try:
            speed = min(ray.get(ranks, timeout=2 * PATIENCE_S))
        finally:
            for rank in ranks:
                ray.cancel(rank, force=True)
    except ray.exceptions.GetTimeoutError:
        return HealthCheck("links", "warn", f"no answer within {2 * PATIENCE_S:.0f} s", "wait until the GPUs are free")
    except ray.exceptions.RayError as err:
        return HealthCheck("links", "bad", " ".join(str(err).split())[-200:], "open all ports between the nodes")
    return verdict_of(speed, len(nodes), backend)


def verdict_of(speed: float, num_nodes: int, backend: str) -> HealthCheck:
    """What a speed in GB/s means."""
    told = f"all-reduce over {num_nodes} nodes at {speed:.2g} GB/s ({backend})"
    if speed < SLOW_GB_S[backend]:
        return HealthCheck("links", "warn", told, REMEDY[backend])
    return HealthCheck("links", "ok", told)


if __name__ == "__main__":  # a rank by hand: python -m ftray.cluster.network_test RANK WORLD_SIZE HOST:PORT BACKEND
    import sys

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(reduce_speed(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]))
