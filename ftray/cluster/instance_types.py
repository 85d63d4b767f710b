"""Machines that can be rented, and how the workers of a run fit on them: arithmetic only.

Knows nothing of Kubernetes' or AWS's ways beyond names and sizes of machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftray import config
from ftray.errors import ConfigError

SYSTEM_CPUS = 4  # of a machine, for its own daemons
SYSTEM_MEMORY = 0.08  # share of its memory, likewise
DATA_CPUS = 1  # in all, that workers leave for reading data


@dataclass(frozen=True)
class InstanceType:
    """A kind of machine. accelerator: its GPU as Ray names it; efa: its network interfaces of that kind."""

    name: str
    cpus: int
    memory_gib: int
    gpus: int = 0
    accelerator: str = ""
    efa: int = 0

    @property
    def usable_cpus(self) -> int:
        """What is left for pods."""
        return self.cpus - SYSTEM_CPUS

    @property
    def usable_gib(self) -> int:
        """What is left for pods."""
        return int(self.memory_gib * (1 - SYSTEM_MEMORY))


# AWS's machines; the first of a GPU kind is the one that is meant unless another is named.
MACHINES = (
    InstanceType("p4d.24xlarge", 96, 1152, 8, "A100", 4),  # 40 GB a card
    InstanceType("p4de.24xlarge", 96, 1152, 8, "A100", 4),  # 80 GB a card
    InstanceType("p5.48xlarge", 192, 2048, 8, "H100", 32),
    InstanceType("p5en.48xlarge", 192, 2048, 8, "H200", 16),
    InstanceType("g6e.48xlarge", 192, 1536, 8, "L40S", 1),
    InstanceType("g5.48xlarge", 192, 768, 8, "A10G", 1),
    InstanceType("m7i.4xlarge", 16, 64),
    InstanceType("m7i.16xlarge", 64, 256),
    InstanceType("m7i.48xlarge", 192, 768),
)


@dataclass(frozen=True)
class PodLayout:
    """How workers lie on machines: `pods` alike, each with `workers` of them and a share of a machine."""

    machine: InstanceType
    pods: int
    min_pods: int
    workers: int
    gpus: int
    cpus: int
    memory_gib: int

    @property
    def shm_gib(self) -> int:
        """Shared memory of a pod, a part of its memory: Ray's object store and NCCL's buffers."""
        return max(1, min(128, self.memory_gib // 4))

    @property
    def object_store_bytes(self) -> int:
        """Ray's object store: most of the shared memory."""
        return self.shm_gib * 2**30 * 3 // 4


def find_instance_type(accelerator: str | None, name: str | None = None) -> InstanceType:
    """The machine of that name, or the first with that GPU (None: without). Raises ConfigError for what there isn't."""
    if name is not None:
        machine_type = next((machine for machine in MACHINES if machine.name == name), None)
        if machine_type is None:
            raise ConfigError(f"--machine {name} is not known; known are {', '.join(m.name for m in MACHINES)}")
        if (accelerator or "") != machine_type.accelerator:
            has = f"{machine_type.gpus} × {machine_type.accelerator}" if machine_type.gpus else "no GPU"
            raise ConfigError(
                f"--machine {name} has {has}, scale.accelerator is {accelerator or 'left out'}; correct one of them"
            )
        return machine_type
    machine_type = next((machine for machine in MACHINES if machine.accelerator == (accelerator or "")), None)
    if machine_type is None:
        kinds = ", ".join(dict.fromkeys(machine.accelerator for machine in MACHINES if machine.gpus))
        raise ConfigError(f"scale.accelerator {accelerator}: no known machine has one; known are {kinds}")
    return machine_type


def plan_pods(run: config.RunConfig, machine: InstanceType) -> PodLayout:
    """Spreads a run's workers evenly over machines of a kind, as few as possible. Raises ConfigError, with the numbers,
    for workers that no such machine holds."""
    each, number = run.scale.cpus_per_worker, run.scale.max_workers
    most = min(machine.gpus or int((machine.usable_cpus - DATA_CPUS) / each + 1e-9), number)
    workers = next((size for size in range(most, 0, -1) if number % size == 0), 1)
    needed = workers * each + (DATA_CPUS if number == workers else 0)
    share = workers / machine.gpus if machine.gpus else needed / machine.usable_cpus
    cpus = int(machine.usable_cpus * share) if machine.gpus else math.ceil(needed)
    room = cpus if machine.gpus else machine.usable_cpus
    if needed > room:
        part = f"{workers} of its {machine.gpus} GPUs" if machine.gpus else "a worker and for reading data"
        raise ConfigError(
            f"scale.cpus_per_worker {each:g}: {workers} workers need {needed:g} CPUs, {machine.name} has {room} for {part}; "
            f"lower it to {(room - needed + workers * each) // workers:g}, or name another --machine"
        )
    return PodLayout(
        machine=machine,
        pods=number // workers,
        min_pods=-(-run.scale.min_workers // workers),
        workers=workers,
        gpus=workers if machine.gpus else 0,
        cpus=cpus,
        memory_gib=max(2, int(machine.usable_gib * share)),
    )
