"""Private API of Ray's job client. Seen with ray 2.60; contract test: tests/unit/test_compat.py."""

from __future__ import annotations

from typing import Any


def cluster_version(client: Any) -> str:
    """The cluster's Ray version.

    Reason: the public `get_version` returns the version of the job protocol.
    """
    return str(client._server_ray_version)
