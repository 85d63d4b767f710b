"""The network by which the ranks of a group talk. Knows Ray Train's way of bringing them together, nothing of training."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from ftray.storage.ports import use_network_of


class GlooBackend(TorchConfig):
    """As Ray's own, but gloo listens where rank 0 is reached from."""

    @property
    def backend_cls(self) -> Any:
        """What Ray Train starts a group with."""
        return _GlooBackendImpl


class _GlooBackendImpl(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Tells each worker its network, and brings them together."""
        try:
            first = worker_group.execute_single(0, ray.util.get_node_ip_address)
            worker_group.execute(use_network_of, first)
            super().on_start(worker_group, backend_config)
        except Exception:
            # Ray Train would keep the placement group until the driver ends, and the next group would get no room.
            worker_group.get_worker_group_state().shutdown()
            raise
