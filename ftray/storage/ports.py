"""Whether anybody listens at an address, and by which network it is reached. Knows sockets, nothing of what answers."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from contextlib import suppress

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


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for certain: a name other than localhost may lead anywhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def use_network_of(host: str) -> None:
    """Lets gloo listen, in this process, at the interface by which `host` is reached, unless it was told another.

    By itself it takes the address of the machine's own name, which on Debian and Ubuntu is 127.0.1.1: no other machine
    reaches that. Where nothing leads to `host`, or behind an address that no interface has, nothing changes.
    """
    import psutil

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing; the kernel picks the way
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(each.address == own for each in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
