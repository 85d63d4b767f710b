"""A conversation as token ids, and the texts that they must decode to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, whether it is trained on.

    Attributes:
        input_ids: A list; from `encode_examples` int32 [tokens].
        loss_mask: A list; from `encode_examples` bool [tokens].
        starts: Where its documents begin. There are several, one per answer, if the template rewrites earlier messages. No
            token of one document may see another.
    """

    input_ids: list[int] | npt.NDArray[np.int32]
    loss_mask: list[bool] | npt.NDArray[np.bool_]
    starts: tuple[int, ...] = (0,)

    def documents(self) -> list[tuple[Any, Any]]:
        """(ids, mask) of each document."""
        if len(self.starts) == 1:
            return [(self.input_ids, self.loss_mask)]
        borders = pairwise([*self.starts, len(self.input_ids)])
        return [(self.input_ids[a:b], self.loss_mask[a:b]) for a, b in borders]

    @property
    def longest(self) -> int:
        """Tokens of its longest document."""
        return max(b - a for a, b in pairwise([*self.starts, len(self.input_ids)]))


@dataclass(frozen=True)
class ExpectedDocument:
    """What the ids of a document must decode to.

    Attributes:
        text: Its text.
        trained: Each part that is trained on.
        prompt: What the template writes before every answer. No part may contain it. Empty if there is no such text.
    """

    text: str
    trained: list[str]
    prompt: str = ""
