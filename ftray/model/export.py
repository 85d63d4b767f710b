"""Writes a trained model: an adapter in PEFT's format, whole weights with their tokenizer, a GGUF file, a hub repository.

GGUF files are written by llama.cpp's own converter, a script of its repository that is in no package: it is named, or found on
PATH, and runs as a process of its own. Uploads use huggingface_hub with its own token (HF_TOKEN, or `hf auth login`) and
endpoint (HF_ENDPOINT); the token appears in no message.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ftray import config
from ftray.compat.transformers import fp32_parts
from ftray.errors import CheckpointError, ConfigError, FtrayError, RunError
from ftray.model.load import absolute_base, load_tokenizer
from ftray.model.lora import dtype_of
from ftray.redact import redacted


def write_adapter(model: Any, base: config.ModelConfig, precision: str, directory: Path) -> None:
    """Saves a PeftModel's adapter in the run's precision, for PEFT's `from_pretrained`."""
    model.to(dtype_of(precision))
    model.save_pretrained(directory, safe_serialization=True)
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"], settings["revision"] = absolute_base(base).base, base.revision
    path.write_text(json.dumps(settings, indent=2, sort_keys=True))
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def write_whole(model: Any, base: config.ModelConfig, precision: str, directory: Path) -> None:
    """Saves whole weights and the tokenizer. Adapters are merged in float32, then rounded once to the run's precision.

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
    """Converts to the dtype, except for parts that transformers always loads in fp32 (routers' corrections)."""
    fp32 = fp32_parts(model, in_fp16=dtype == torch.float16)
    exact = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if any(f".{part}." in f".{name}." for part in fp32)
    }
    model.to(dtype)
    for name, tensor in exact.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, _like(getattr(model.get_submodule(owner), leaf), tensor))


def _like(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(values, requires_grad=False) if isinstance(old, torch.nn.Parameter) else values


CONVERTER = "FTRAY_GGUF_CONVERTER"
_CONVERTER_NAMES = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
_GGUF_TYPES = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}


def find_converter(path: str | None) -> Path:
    """The converter: the given path, else the one in FTRAY_GGUF_CONVERTER, else on PATH. Raises ConfigError."""
    chosen = path or os.environ.get(CONVERTER)
    if chosen is not None:
        file = Path(chosen).expanduser()
        if not file.is_file():
            key = "--converter" if path else CONVERTER
            raise ConfigError(f"{key} {chosen} is not a file; use llama.cpp's convert_hf_to_gguf.py")
        return file.resolve()
    installed = next((script for name in _CONVERTER_NAMES if (script := shutil.which(name))), None)
    if installed is None:
        raise ConfigError(
            "--to gguf needs llama.cpp's converter, which is not installed; get convert_hf_to_gguf.py from llama.cpp's "
            f"repository, and put it on PATH or set {CONVERTER}"
        )
    return Path(installed)


def convert_to_gguf(converter: Path, source: Path, target: Path, precision: str) -> int:
    """Writes the model of a directory as a GGUF file and checks it; returns its number of tensors. Raises RunError."""
    command = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    command += [str(source), "--outfile", str(target), "--outtype", _GGUF_TYPES[precision]]
    try:
        done = subprocess.run(  # nosec B603 # a list of words, no shell
            command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
        )
    except OSError as err:
        raise RunError(f"the converter {converter} cannot be run ({err.strerror}); correct it") from None
    if done.returncode != 0 or not target.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1][:300]
        raise RunError(
            f"the converter {converter} wrote no file (exit code {done.returncode}: {last}); fix that, or use a newer one"
        )
    layers = json.loads((source / "config.json").read_text()).get("num_hidden_layers")
    return _check_gguf(target, converter, layers)


def _check_gguf(file: Path, converter: Path, num_layers: int | None) -> int:
    """The number of tensors. Raises RunError for a file without the embeddings, or without one of the model's layers."""
    from gguf import GGUFReader

    try:
        names = {tensor.name for tensor in GGUFReader(file).tensors}
    except Exception as err:  # noqa: BLE001 - the reader raises anything for an invalid file
        raise RunError(
            f"the output of the converter {converter} is not a GGUF file ({err}); use llama.cpp's converter"
        ) from None
    blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
    missing = [f"layer {n}" for n in range(num_layers or 0) if str(n) not in blocks]
    if "token_embd.weight" not in names:
        missing.insert(0, "the embeddings")
    if missing:
        raise RunError(
            f"the output of the converter {converter} lacks {missing[0]} of the model; use a newer converter"
        )
    return len(names)


HUB_PREFIX = "hub:"
# Deleted before an upload: an adapter beside whole weights, or old shards, would be loaded with the new files.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja")


def check_push(address: str) -> str:
    """The `org/name` of `hub:org/name`, after the hub has accepted the token.

    Raises:
        ConfigError: The address has another form, or the token is missing or refused.
        RunError: The hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = address.removeprefix(HUB_PREFIX)
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if not address.startswith(HUB_PREFIX) or name.count("/") != 1:
        raise ConfigError(f"--push {address} is not a hub repository; write hub:org/name")
    if get_token() is None:
        raise ConfigError(f"--push {address} needs a token with write access; set HF_TOKEN, or run: hf auth login")
    with _explained(address):
        HfApi().whoami()
    return name


def push_to_hub(directory: Path, name: str, message: str) -> str:
    """Uploads all files of a directory as one commit; returns its URL. A new repository is private. Raises as `check_push`."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    with _explained(HUB_PREFIX + name):
        if not api.repo_exists(name):
            api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=directory, commit_message=message, delete_patterns=list(_MODEL_FILES)
        )
        return str(commit.commit_url)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns the library's errors into ftray's, without the token."""
    try:
        yield
    except Exception as err:  # noqa: BLE001 - errors of the library, its HTTP client and its uploader
        raise _explain(address, err) from None


def _explain(address: str, err: BaseException) -> FtrayError:
    from huggingface_hub import constants, get_token

    while err.__cause__ is not None and not hasattr(err, "response"):  # an upload's thread wraps the error
        err = err.__cause__
    status = getattr(getattr(err, "response", None), "status_code", None)
    if status == 401:
        return ConfigError(
            f"--push {address}: {constants.ENDPOINT} refuses the token; create another one, and set HF_TOKEN"
        )
    if status == 403:
        return ConfigError(f"--push {address}: the token has no write access; grant it, or choose another name")
    if status in (400, 404, 422):
        reason = redacted(" ".join(str(err).split())).replace(get_token() or "\0", "…")[:300]
        return ConfigError(f"--push {address}: {constants.ENDPOINT} refuses it ({reason}); correct that")
    if constants.is_offline_mode():
        return ConfigError(f"--push {address}: HF_HUB_OFFLINE is set; unset it")
    reason = redacted(" ".join(str(err).split())).replace(get_token() or "\0", "…")[:200] or type(err).__name__
    problem = "does not answer like a hub" if status is not None else "cannot be reached"
    return RunError(f"--push {address}: {constants.ENDPOINT} {problem} ({reason}); run the command again")
