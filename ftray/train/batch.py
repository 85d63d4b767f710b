"""From a rank's packed sequences to the micro-batches that go through the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from ftray.data.loader import RankBatch


class Batch(NamedTuple):
    """Packed sequences laid end to end without their padding.

    A tuple, so that DeepSpeed finds the tensors in it.

    Attributes:
        input_ids: int64 [1, tokens].
        labels: int64 [1, tokens]; IGNORE_INDEX where a token is not trained.
        position_ids: int64 [1, tokens]; they restart at 0 in each document.
        cu_seqlens: int32 [documents + 1]; the start of each document, and the end.
        max_length: Tokens of the longest document.
        inputs_embeds: [1, tokens, width], in place of `input_ids` where an objective adds embeddings.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    inputs_embeds: torch.Tensor | None = None


def collate(
    input_ids: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
    position_ids: npt.NDArray[np.int32],
    num_tokens: npt.NDArray[np.int32],
    device: torch.device | str = "cpu",
) -> Batch:
    """Packed sequences [sequences, max_seq_len] → one Batch on the device.

    Args:
        input_ids: int32 [sequences, max_seq_len].
        labels: As input_ids.
        position_ids: As input_ids.
        num_tokens: int32 [sequences]; tokens of each sequence before its padding.
        device: Target device.
    """

    def flat(matrix: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        return np.concatenate([row[:n] for row, n in zip(matrix, num_tokens, strict=True)]).astype(np.int64)

    def send(array: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    positions = flat(position_ids)
    starts = np.append(np.flatnonzero(positions == 0), len(positions)).astype(np.int32)
    return Batch(
        send(flat(input_ids)[None]),
        send(flat(labels)[None]),
        send(positions[None]),
        send(starts),
        int(np.diff(starts).max(initial=0)),
    )


def micro_batches(batch: RankBatch, size: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """(index of the first packed sequence in the run, Batch) of each `size` packed sequences."""
    for lo in range(0, len(batch.input_ids), size):
        part = slice(lo, lo + size)
        arrays = (batch.input_ids[part], batch.labels[part], batch.position_ids[part], batch.num_tokens[part])
        yield batch.first_sequence + lo, collate(*arrays, device=device)


def sequence_hash(sequence_ids: list[tuple[int, int, int, int]]) -> float:
    """Order-independent hash of a set of packed sequences: a sum of 40 bits each, exact in float64.

    Its sum over ranks does not depend on which rank holds which sequence.
    """
    return float(
        sum(int.from_bytes(hashlib.blake2b(repr(r).encode(), digest_size=5).digest(), "big") for r in sequence_ids)
    )


def dropout_seed(seed: int, step: int, first_sequence: int) -> int:
    """Seed of a micro-batch's dropout, from the run's seed, the step and the first sequence of the micro-batch."""
    digest = hashlib.blake2b(f"{seed}/{step}/{first_sequence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
