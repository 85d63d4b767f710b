"""By which network the ranks of a group talk."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
import pytest

from ftray.compat.ray_train import TorchBackend
from ftray.driver.worker_group import GlooBackend
from ftray.network import use_interface_to

NAME = "GLOO_SOCKET_IFNAME"


class Group:
    """What Ray Train hands to a backend, as far as it is used here. done: what was asked of it, in its order."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def execute_single(self, rank: int, act: Any) -> str:
        return "10.77.0.1" if rank == 0 else ""

    def execute(self, act: Any, *arguments: Any) -> None:
        self.done.append((act, arguments))

    def get_worker_group_state(self) -> Group:
        return self

    def shutdown(self) -> None:
        self.done.append("shutdown")


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is not set, and will be as it was."""
    monkeypatch.setenv(NAME, "")
    monkeypatch.delenv(NAME)


def test_gloo_listens_at_the_interface_that_leads_to_the_first_rank(untold: None) -> None:
    loopback = [name for name, each in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in each)]
    use_interface_to("127.0.0.1")
    assert os.environ[NAME] in loopback


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "ib0")
    use_interface_to("127.0.0.1")
    assert os.environ[NAME] == "ib0"


def test_a_host_that_nothing_leads_to_changes_nothing(untold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", nowhere)
    use_interface_to("10.77.0.1")
    assert NAME not in os.environ


def test_each_worker_is_told_before_the_ranks_look_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        TorchBackend, "on_start", lambda _, group, config: group.done.append(f"{config.backend} ranks meet")
    )
    group, config = Group(), GlooBackend(backend="gloo")
    config.backend_cls().on_start(group, config)
    assert group.done == [(use_interface_to, ("10.77.0.1",)), "gloo ranks meet"]


def test_ranks_that_do_not_find_each_other_leave_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed")

    monkeypatch.setattr(TorchBackend, "on_start", fails)
    group, config = Group(), GlooBackend(backend="gloo")
    with pytest.raises(RuntimeError, match="connectFullMesh"):
        config.backend_cls().on_start(group, config)
    assert group.done[-1] == "shutdown"
