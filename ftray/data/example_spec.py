"""What an objective's records are and how they become packed sequences. Imports neither Ray nor torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExampleSpec:
    """What an objective needs from the data.

    Attributes:
        kinds: Kinds of records that the objective accepts: `conversation`, `text`.
        sequences: Documents that one record becomes; they stay in the same micro-batch.
        columns: Columns of a packed sequence besides input_ids, labels and position_ids.
    """

    kinds: frozenset[str] = frozenset({"conversation", "text"})
    sequences: int = 1
    columns: tuple[str, ...] = ()

    def accepts(self, record_format: str) -> bool:
        """Whether records of a value of `data.train[].format` are accepted; `auto` is decided record by record."""
        kind = "text" if record_format == "text" else "conversation"
        return record_format == "auto" or kind in self.kinds
