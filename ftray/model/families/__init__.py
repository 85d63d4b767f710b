"""Model families: what differs between dense, mixture-of-experts and hybrid models. Start with `base`."""

from ftray.model.families import dense, hybrid, moe  # noqa: F401 - they register themselves
from ftray.model.families.base import ModelFamily, family_of, register

__all__ = ["ModelFamily", "family_of", "register"]
