"""Whether anybody listens at an address. Knows sockets, nothing of what answers."""

from __future__ import annotations

import re
import socket

CONNECT_S = 10.0  # what takes longer to accept a connection is down, or not to be reached from here


def knock(address: str) -> None:
    """Raises OSError if nobody listens at `host:port`; other addresses are not looked at."""
    found = re.fullmatch(r"\[?([^/\[\]]+?)\]?:(\d+)/?", address)
    if found:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S).close()


def answers(address: str) -> bool:
    """Whether somebody listens at `host:port`."""
    try:
        knock(address)
    except OSError:
        return False
    return True
