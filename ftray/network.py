"""TCP reachability, and the network interface that gloo uses."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from contextlib import suppress

CONNECT_S = 10.0  # a server that takes longer to accept a connection counts as down


def connect(host: str, port: int) -> None:
    """Opens and closes a TCP connection. Raises OSError if nobody listens."""
    socket.create_connection((host.strip("[]"), port), timeout=CONNECT_S).close()


def check_listening(address: str) -> None:
    """Raises OSError if nobody listens at `host:port`. Addresses of another form are not checked."""
    if match := re.fullmatch(r"\[?([^/\[\]]+?)\]?:(\d+)/?", address):
        connect(match[1], int(match[2]))


def is_listening(address: str) -> bool:
    """Whether somebody listens at `host:port`."""
    try:
        check_listening(address)
    except OSError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a host is certainly this machine. Names other than localhost may resolve to any machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def use_interface_to(host: str) -> None:
    """Makes gloo use the network interface that leads to `host`, unless GLOO_SOCKET_IFNAME is already set.

    By default gloo uses the address of the machine's own name, which is 127.0.1.1 on Debian and Ubuntu: no other machine
    reaches it. Without a route to `host`, or with an address that no interface has, nothing changes.
    """
    import psutil

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing; the kernel selects the interface
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(each.address == own for each in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
