"""ftray: fine-tune, evaluate and serve language models on Ray from one YAML file.

The names of the Python API (`ftray.api`) are imported when they are first used, so that `import ftray` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftray.api import Run, load_config, plan

__all__ = ["Run", "__version__", "load_config", "plan"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ftray")
    if name in __all__:
        from ftray import api

        return getattr(api, name)
    raise AttributeError(f"module 'ftray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
