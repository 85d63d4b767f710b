"""The device mesh: data and sequence groups of a worker group, and its collectives without a group."""

from __future__ import annotations

import pytest

from ftray import config
from ftray.train.parallel import DeviceMesh


def test_ranks_of_a_sequence_group_are_neighbors_and_share_a_data_rank() -> None:
    meshes = [DeviceMesh(rank, 6, sequence_size=2) for rank in range(6)]
    assert [mesh.data_rank for mesh in meshes] == [0, 0, 1, 1, 2, 2]
    assert [mesh.sequence_rank for mesh in meshes] == [0, 1, 0, 1, 0, 1]
    assert {mesh.data_size for mesh in meshes} == {3}
    assert [mesh.is_first for mesh in meshes] == [True, *[False] * 5]
    with pytest.raises(ValueError, match="world size 6 is not a multiple of 4"):
        DeviceMesh(0, 6, sequence_size=4)


def test_every_rank_is_a_data_rank_today() -> None:
    assert [(m.data_rank, m.data_size, m.sequence_size) for m in (DeviceMesh(r, 3) for r in range(3))] == [
        (0, 3, 1),
        (1, 3, 1),
        (2, 3, 1),
    ]


def test_a_process_without_a_group_is_a_mesh_of_one() -> None:
    mesh = DeviceMesh.from_config(config.ScaleConfig())
    assert (mesh.rank, mesh.world_size) == (0, 1)
    assert mesh.sum([1.0, 2.5]) == mesh.max([1.0, 2.5]) == [1.0, 2.5]
    assert mesh.broadcast({"a": 1}) == {"a": 1}
    assert (mesh.device_name, mesh.peak_memory_gib()) == ("CPU", None)
