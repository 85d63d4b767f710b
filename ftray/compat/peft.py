"""Private APIs of PEFT. Seen with peft 0.21; contract tests: tests/unit/test_compat.py."""

from __future__ import annotations

from typing import Any


def register_layers(settings: Any, layers: dict[type, type]) -> None:
    """Makes a LoraConfig use ftray's own layers: the base layer's class → the class that carries its adapter.

    Reason: PEFT documents this method as experimental and private. Upstream: tuners/lora/config.py.
    """
    settings._register_custom_module(layers)
