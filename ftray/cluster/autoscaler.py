"""Requests the machines of a run from Ray's autoscaler, and waits for them. Needs a joined Ray."""

from __future__ import annotations

import time
from collections.abc import Callable

from ftray import config
from ftray.errors import Preempted

POLL_S = 5.0


def bundles_of(run: config.RunConfig) -> list[dict[str, float]]:
    """The resource bundles of the run's minimum number of workers."""
    needs = {"CPU": run.scale.cpus_per_worker}
    if run.scale.accelerator is not None:
        needs |= {"GPU": 1.0, f"accelerator_type:{run.scale.accelerator}": 0.001}
    return [needs] * run.world_sizes[-1]


def wait_for_nodes(run: config.RunConfig, has_room: Callable[[], bool]) -> None:
    """Requests machines until `has_room` returns True. Raises Preempted after `scale.wait_s`.

    The request is withdrawn at the end, because the run's own workers then keep the machines.
    """
    from ray.autoscaler.sdk import request_resources

    if has_room():
        return
    request_resources(bundles=bundles_of(run))
    deadline = time.monotonic() + run.scale.wait_s
    try:
        while not has_room():
            if time.monotonic() > deadline:
                raise Preempted(
                    f"no machines for {run.world_sizes[-1]} workers within {run.scale.wait_s:g} s (scale.wait_s): request "
                    "a higher quota, or try another zone; submit again to keep waiting"
                )
            time.sleep(min(POLL_S, max(0.1, run.scale.wait_s)))
    finally:
        request_resources(bundles=[])
