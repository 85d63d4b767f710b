"""What is kept of a trained model: the adapter in PEFT's format, and whole weights as safetensors with their tokenizer.

Knows models; nothing of checkpoints, runs or storage: it writes local directories.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ftray import config
from ftray.compat.transformers import fp32_parts
from ftray.errors import CheckpointError
from ftray.model.load import absolute_base, load_tokenizer
from ftray.model.lora import dtype_of


def write_adapter(model: Any, base: config.ModelConfig, precision: str, directory: Path) -> None:
    """Saves a PeftModel's adapter, in the run's precision, for PEFT's own `from_pretrained`."""
    model.to(dtype_of(precision))
    model.save_pretrained(directory, safe_serialization=True)
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"], settings["revision"] = absolute_base(base).base, base.revision
    path.write_text(json.dumps(settings, indent=2, sort_keys=True))
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def write_whole(model: Any, base: config.ModelConfig, precision: str, directory: Path) -> None:
    """Saves whole weights, adapters merged in float32 and then rounded once to the run's precision, and the tokenizer.

    Raises CheckpointError if a weight is empty or not finite.
    """
    from peft import PeftModel

    model = model.to(torch.float32)
    whole = model.merge_and_unload() if isinstance(model, PeftModel) else model
    for name, tensor in whole.state_dict().items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise CheckpointError(f"the weight {name} is empty or not finite; export an earlier checkpoint")
    _round(whole, dtype_of(precision))
    whole.config.use_cache = True
    whole.save_pretrained(directory)
    load_tokenizer(base).save_pretrained(directory)


def _round(model: Any, dtype: torch.dtype) -> None:
    """To the dtype, but for what transformers keeps in fp32 whenever it loads such a model (routers' corrections)."""
    kept = fp32_parts(model, in_fp16=dtype == torch.float16)
    exact = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if any(f".{part}." in f".{name}." for part in kept)
    }
    model.to(dtype)
    for name, tensor in exact.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, _like(getattr(model.get_submodule(owner), leaf), tensor))


def _like(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(values, requires_grad=False) if isinstance(old, torch.nn.Parameter) else values
