"""Dense models: attention and a feed-forward layer in every block."""

from __future__ import annotations

from ftray.model.families.base import ModelFamily, register


class Dense(ModelFamily):
    """The default family."""

    name = "dense"


register(Dense, default=True)
