"""The eval loss during training: one mean over the trained tokens of the eval set, each rank over its share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
import torch

from ftray import config
from ftray.data.loader import RankBatch, to_batch
from ftray.data.packing import IGNORE_INDEX
from ftray.train.batch import micro_batches
from ftray.train.parallel import DeviceMesh


class Evaluator:
    """Computes the eval loss every `evaluate.every` steps.

    Args:
        settings: The section `evaluate`.
        table: Reference to the table of eval sequences; None without an eval set.
        mesh: This rank's place.
        micro_batch_size: Packed sequences per forward pass.
    """

    def __init__(self, settings: config.EvaluateConfig, table: Any, mesh: DeviceMesh, micro_batch_size: int) -> None:
        self._settings, self._table, self._mesh, self._size = settings, table, mesh, micro_batch_size

    def is_due(self, step: int) -> bool:
        """Whether an eval follows after `step` steps."""
        every = self._settings.every
        return every is not None and self._table is not None and step % every == 0

    def is_out_of_patience(self, since_best: int) -> bool:
        """Whether early stopping ends the run after so many evals without a better loss."""
        return self._settings.early_stopping is not None and since_best >= self._settings.early_stopping

    def loss(self, model: Any) -> float:
        """The eval loss. Collective. model: An engine; it is in training mode afterwards."""
        share = eval_share(ray.get(self._table), self._mesh)
        loss_sum, weight = loss_sums(model, share, self._size, self._mesh.device)
        model.train()
        loss_sum, weight = self._mesh.sum([loss_sum, weight])
        return loss_sum / weight


def eval_share(table: pa.Table, mesh: DeviceMesh) -> RankBatch:
    """A rank's eval sequences, as many on each rank: ranks with sharded weights gather them together.

    Where the number of sequences is not divisible, some ranks end with a sequence without trained tokens: it counts nothing.
    """
    each = -(-table.num_rows // mesh.data_size)
    rows = range(mesh.data_rank, each * mesh.data_size, mesh.data_size)
    batch = to_batch(table.take(pa.array([row % table.num_rows for row in rows], pa.int64())))
    labels = batch.labels.copy()
    labels[[row >= table.num_rows for row in rows]] = IGNORE_INDEX
    return replace(batch, labels=labels)


def loss_sums(model: Any, batch: RankBatch, micro_batch_size: int, device: torch.device) -> tuple[float, float]:
    """(loss, weight) summed over a batch. model: An ObjectiveModel or its engine; left in eval mode."""
    model.eval()
    loss_sum, weight_sum = 0.0, 0.0
    with torch.no_grad():
        for _, micro in micro_batches(batch, micro_batch_size, device):
            loss, weight = model(micro)
            loss_sum += float(loss)
            weight_sum += weight
    return loss_sum, weight_sum
