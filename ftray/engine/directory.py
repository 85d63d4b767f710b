"""Is this directory a model? Looks at names only; imports neither torch nor transformers, so that a driver may ask."""

from __future__ import annotations

from pathlib import Path

from ftray.errors import ModelError
from ftray.storage.model_directory import check_model_files


def check_model_directory(directory: Path) -> None:
    """Raises ModelError naming what a model directory lacks: config, safetensors, tokenizer."""
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory; make a model with `ftray export`")
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise ModelError(f"{directory} holds an adapter without its base; merge them with `ftray export`")
    wanted = {
        "config.json": "config.json",
        "weights (*.safetensors)": "*.safetensors",
        "a tokenizer (tokenizer.json)": "tokenizer*.json",
    }
    missing = [what for what, pattern in wanted.items() if not any(directory.glob(pattern))]
    if missing:
        raise ModelError(f"{directory} is no model: it lacks {', '.join(missing)}; make one with `ftray export`")
    check_model_files(directory)
