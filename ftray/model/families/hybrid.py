"""Hybrid models: some blocks carry a recurrent state (Mamba, linear attention, RWKV) instead of attending.

No mask keeps a recurrent state inside a document. The packing check tries the model itself, and refuses it where documents
of a packed sequence influence each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftray.model.families.base import ModelFamily, expert_key, register

RECURRENT = ("linear", "mamba", "recurrent", "rwkv", "ssm")  # in the names of layer types
TYPES = ("falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "minimax", "nemotron_h", "recurrent_gemma", "rwkv")


class Hybrid(ModelFamily):
    """Accepted only as far as the packing check finds that documents do not influence each other."""

    name = "hybrid"

    @property
    def unplanned(self) -> str | None:
        """The key that gives the number of experts, where the model has experts, too."""
        return expert_key(self.settings)


def _has_states(settings: Mapping[str, Any]) -> bool:
    kinds = settings.get("layer_types") or settings.get("layers_block_type") or ()
    return any(word in str(kind) for kind in kinds for word in RECURRENT)


register(Hybrid, model_types=TYPES, structure=_has_states)
