"""The ranks of a worker group as a mesh of data-parallel and sequence-parallel groups, and the collectives over it.

The order of the data applies to data ranks. Ranks of one sequence group share their packed sequences; today each group has
one rank. No other module reads the world size of torch.distributed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ftray import config

SEQUENCE_SIZE = 1


class DeviceMesh:
    """Where this process is in the mesh.

    Args:
        rank: Rank in the worker group.
        world_size: Ranks of the worker group.
        device: Device of this rank.
        sequence_size: Ranks that share a packed sequence.

    Raises:
        ValueError: The world size is not a multiple of `sequence_size`.
    """

    def __init__(
        self, rank: int, world_size: int, device: torch.device | str = "cpu", sequence_size: int = SEQUENCE_SIZE
    ) -> None:
        if world_size % sequence_size:
            raise ValueError(f"world size {world_size} is not a multiple of {sequence_size} sequence-parallel ranks")
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.sequence_rank, self.sequence_size = rank % sequence_size, sequence_size
        self.data_rank, self.data_size = rank // sequence_size, world_size // sequence_size

    @classmethod
    def from_config(cls, parallel: config.ScaleConfig, device: torch.device | str = "cpu") -> DeviceMesh:
        """The mesh of this process's torch.distributed group; of one rank without a group."""
        del parallel  # it has no sequence-parallel degree yet
        if not dist.is_initialized():
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which talks to driver and storage."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Name of this rank's GPU, or `CPU`."""
        return "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def peak_memory_gib(self) -> float | None:
        """Peak of allocated memory on this rank's GPU; None on a CPU."""
        if self.device.type == "cpu":
            return None
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64. Collective."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Maxima over all ranks, in float64. Collective."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(tensor, op)
        return [float(value) for value in tensor]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank. Collective."""
        values = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(values, src=0)
        return values[0]
