"""Where this machine keeps what can be made again. Makes nothing there, and knows no room."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Local directory for what can be made again: $FTRAY_CACHE, else $XDG_CACHE_HOME/ftray, else ~/.cache/ftray."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FTRAY_CACHE") or f"{base}/ftray").expanduser().absolute()
