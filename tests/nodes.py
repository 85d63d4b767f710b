"""A Ray cluster of several nodes in a process of its own, which reads whether it wants a token when it starts.

    python -m tests.nodes <dashboard port> <CPUs of each node> …

prints `up` and where it may be joined, and ends when its standard input does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self


class TokenCluster:
    """A head without CPUs and nodes with some, behind a token. address: of its dashboard; gcs_address: for RAY_ADDRESS."""

    def __init__(self, port: int, token: str, env: dict[str, str], cpus: tuple[int, ...] = (2, 2)) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))},
            **env,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._command = [sys.executable, "-m", "tests.nodes", str(port), *map(str, cpus)]

    def __enter__(self) -> Self:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(self._command, env=self.env, **streams)
        assert self._process.stdout is not None
        word, _, self.gcs_address = self._process.stdout.readline().strip().partition(" ")
        if word != "up":
            self.__exit__(None, None, None)
            raise RuntimeError("the cluster did not come up; its own words stand above, on standard error")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def main(port: int, cpus: list[int]) -> None:
    """Starts the nodes and waits."""
    from ray.cluster_utils import Cluster

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    for number in cpus:
        nodes.add_node(num_cpus=number)
    print("up", nodes.address, file=out, flush=True)
    sys.stdin.read()
    nodes.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(text) for text in sys.argv[2:]])
