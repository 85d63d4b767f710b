"""Private APIs of Ray. Seen with ray 2.60; contract tests: tests/unit/test_compat.py."""

from __future__ import annotations

import ray


def free_resources() -> dict[str, dict[str, float]]:
    """Free resources of each node, by node id.

    Reason: `ray.available_resources` sums over the cluster; a worker needs its resources on one node.
    """
    nodes: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return nodes


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away: a spot instance's notice, or a drain command.

    Reason: Ray Train's own watcher asks the same; its public `get_preemption_info` is a barrier at each step.
    """
    return set(ray._private.state.state.get_draining_nodes())
