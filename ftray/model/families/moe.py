"""Mixture-of-experts models: a router sends each token to a few of many feed-forward layers."""

from __future__ import annotations

from ftray.model.families.base import ModelFamily, expert_key, register


class MixtureOfExperts(ModelFamily):
    """The planner does not know the memory of experts."""

    name = "mixture of experts"

    @property
    def unplanned(self) -> str | None:
        """The key that gives the number of experts."""
        return expert_key(self.settings)


register(MixtureOfExperts, structure=lambda settings: expert_key(settings) is not None)
