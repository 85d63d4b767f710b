"""Whole weights as one GGUF file, by llama.cpp's own converter where one is installed. Knows no runs.

The converter is no part of any package of llama.cpp's authors: it is a script of their repository. So it is named, or found
on PATH, and run as a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ftray.errors import ConfigError, RunError

CONVERTER = "FTRAY_GGUF_CONVERTER"
_NAMES = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
_TYPES = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}


def find_converter(given: str | None) -> Path:
    """The converter that is named, or that FTRAY_GGUF_CONVERTER names, or on PATH. Raises ConfigError."""
    named = given or os.environ.get(CONVERTER)
    if named is not None:
        path = Path(named).expanduser()
        if not path.is_file():
            key = "--converter" if given else CONVERTER
            raise ConfigError(f"{key} {named} is no file; give llama.cpp's convert_hf_to_gguf.py")
        return path.resolve()
    found = next((place for name in _NAMES if (place := shutil.which(name))), None)
    if found is None:
        raise ConfigError(
            "--to gguf needs llama.cpp's converter, which is not installed; get convert_hf_to_gguf.py out of llama.cpp's "
            f"repository, and put it on PATH or name it in {CONVERTER}"
        )
    return Path(found)


def convert(converter: Path, source: Path, target: Path, precision: str) -> int:
    """Writes the model of a directory as a GGUF file, checked; returns its number of tensors. Raises RunError."""
    how = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    words = [*how, str(source), "--outfile", str(target), "--outtype", _TYPES[precision]]
    try:
        ended = subprocess.run(  # nosec B603 # a list of words, no shell
            words, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
        )
    except OSError as err:
        raise RunError(f"the converter {converter} can't be run ({err.strerror}); correct it") from None
    if ended.returncode != 0 or not target.is_file():
        last = (ended.stderr.strip() or ended.stdout.strip() or "it said nothing").splitlines()[-1][:300]
        raise RunError(
            f"the converter {converter} wrote no file and ended with {ended.returncode} ({last}); mend that, or use a newer one"
        )
    layers = json.loads((source / "config.json").read_text()).get("num_hidden_layers")
    return _check(target, converter, layers)


def _check(file: Path, converter: Path, num_layers: int | None) -> int:
    """Number of tensors of a file that has the embeddings and, of each of the model's layers, some."""
    from gguf import GGUFReader

    try:
        names = {tensor.name for tensor in GGUFReader(file).tensors}
    except Exception as err:  # noqa: BLE001 - whatever a reader meets in a file that is none
        raise RunError(f"what the converter {converter} wrote is no GGUF file ({err}); use llama.cpp's") from None
    blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
    lacks = [f"layer {n}" for n in range(num_layers or 0) if str(n) not in blocks]
    if "token_embd.weight" not in names:
        lacks.insert(0, "the embeddings")
    if lacks:
        raise RunError(f"what the converter {converter} wrote lacks {lacks[0]} of the model; use a newer one")
    return len(names)
