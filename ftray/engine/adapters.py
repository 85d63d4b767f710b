"""Reads and checks LoRA adapter directories and the headers of safetensors files. Plain Python: no torch.

Publishing checks an adapter before it writes, serving before it loads. The format is PEFT's, safetensors only, with the options
that ftray trains: LoRA, rsLoRA and DoRA over linear layers. A header comes from the author of the file, so its length, names,
shapes, types and offsets are all bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ftray.errors import ModelError
from ftray.storage import strict_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 1024
MAX_CONFIG_BYTES = 1 << 20
MAX_ALPHA = 1e6
_DTYPES = ("F32", "F16", "BF16")  # what ftray and PEFT write; others would be converted without a word
VLLM_MAX_RANK = 64  # with vLLM, which reserves memory for this rank in each of its places
_PREFIX = "base_model.model."
_PARTS = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
# Options that would change what the adapter computes, with the values under which they change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, {}, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
}


_NOT_SERVED = (
    "lm_head",
    "embed_tokens",
)  # the head sees only the tokens that answers come from, an embedding none at all


@dataclass(frozen=True)
class AdapterSettings:
    """The settings in adapter_config.json that affect the answer. base, revision: the model that it was trained on."""

    rank: int
    scaling: float
    use_dora: bool
    base: str
    revision: str | None


def read_settings(text: bytes, where: str) -> AdapterSettings:
    """Reads adapter_config.json. Raises ModelError naming the option that this version cannot serve."""
    again = "write it again with `ftray export`"
    try:
        tree = strict_json.parse(text, max_bytes=MAX_CONFIG_BYTES, max_depth=16)
    except ValueError as err:
        raise ModelError(f"{where}/{CONFIG_FILE} is not a valid adapter config: {err}; {again}") from None
    if not isinstance(tree, dict) or not {"peft_type", "r", "lora_alpha"} <= tree.keys():
        raise ModelError(
            f"{where}/{CONFIG_FILE} is not a valid adapter config: it lacks peft_type, r or lora_alpha; {again}"
        )
    kind, rank, alpha = tree["peft_type"], tree["r"], tree["lora_alpha"]
    base, revision = tree.get("base_model_name_or_path"), tree.get("revision")
    for key, value, types in (
        ("peft_type", kind, str),
        ("r", rank, int),
        ("lora_alpha", alpha, int | float),
        ("base_model_name_or_path", base, str | None),
        ("revision", revision, str | None),
        ("use_rslora", tree.get("use_rslora"), bool | None),
        ("use_dora", tree.get("use_dora"), bool | None),
    ):
        if not isinstance(value, types) or (isinstance(value, bool) and types in (int, int | float)):
            raise ModelError(f"{where}/{CONFIG_FILE}: {key} is {str(value)[:60]!r}, which has the wrong type; {again}")
    if kind != "LORA":
        raise ModelError(
            f"{where} is a {kind[:60]!r} adapter; only LoRA can be served beside others: train with method.type lora"
        )
    if not (1 <= rank <= MAX_RANK and abs(alpha) <= MAX_ALPHA):
        raise ModelError(
            f"{where}: rank {str(rank)[:20]} and alpha {str(alpha)[:20]} are out of bounds; the rank is 1 to {MAX_RANK}, "
            f"alpha at most {MAX_ALPHA:g}"
        )
    for option, harmless in _PLAIN.items():
        if tree.get(option) not in harmless:
            raise ModelError(
                f"{where} uses PEFT's {option}, which can't be served; train without it, or serve it merged"
            )
    scaling = alpha / math.sqrt(rank) if tree.get("use_rslora") else alpha / rank
    return AdapterSettings(rank, scaling, bool(tree.get("use_dora")), str(base), revision)


def read_adapter_files(directory: Path) -> tuple[AdapterSettings, dict[str, list[int]]]:
    """Settings of an adapter directory and the shapes of its tensors, by name. Reads no tensor.

    Raises:
        ModelError: A file is missing, not a regular file, too large or malformed, or a tensor does not have 16 or 32 bits.
    """
    where = str(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():  # a pipe or a device would be read without end
            raise ModelError(f"{where}/{name} is missing or not a regular file; publish the adapter again")
    try:
        with (directory / CONFIG_FILE).open("rb") as file:
            settings = read_settings(file.read(MAX_CONFIG_BYTES + 1), where)
        path = directory / WEIGHTS_FILE
        with path.open("rb") as file:
            length = header_length(file.read(8), str(path))
            tensors = read_header(file.read(length), path.stat().st_size - 8 - length, str(path))
    except OSError as err:
        raise ModelError(f"{where} can't be read as an adapter ({err.strerror}); publish it again") from None
    return settings, adapter_shapes(tensors, where)


def adapter_shapes(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, list[int]]:
    """Shapes of an adapter's tensors. Raises ModelError for a dtype that adapters do not have."""
    allowed = f"{', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}"
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ModelError(f"{where}: {name} has dtype {tensor.dtype}; adapters must be {allowed}. Convert it")
    return {name: tensor.shape for name, tensor in tensors.items()}


def layers_of(settings: AdapterSettings, shapes: Mapping[str, list[int]], where: str) -> dict[str, dict[str, str]]:
    """Layer of the base → part (lora_A, lora_B, lora_magnitude_vector) → name of its tensor in the file.

    Raises:
        ModelError: A tensor belongs to no LoRA layer, or a layer lacks a part.
    """
    layers: dict[str, dict[str, str]] = {}
    for name in sorted(shapes):
        found = _PARTS.fullmatch(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
        if found is None:
            raise ModelError(
                f"{where} has the tensor {name}, which is not part of LoRA over a linear layer; it can't be served"
            )
        layers.setdefault(found["layer"], {})[found["part"]] = name
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if settings.use_dora else set())
    if not layers:
        raise ModelError(f"{where} holds no tensor; write it again with `ftray export`")
    for layer, parts in layers.items():
        if parts.keys() != wanted:
            raise ModelError(f"{where}: {layer} has {', '.join(sorted(parts))} instead of {', '.join(sorted(wanted))}")
    return layers


def check_adapter(
    settings: AdapterSettings, shapes: Mapping[str, list[int]], base_shapes: Mapping[str, list[int]], where: str
) -> dict[str, dict[str, str]]:
    """`layers_of`, after comparing each tensor's shape with the base's layer and the rank.

    Args:
        settings: The adapter's settings.
        shapes: Shapes of the adapter's tensors.
        base_shapes: [out, in] of the base's weights, by name with `.weight`.
        where: The adapter's name in messages.

    Raises:
        ModelError: The adapter does not fit. The message names the layer.
    """
    layers = layers_of(settings, shapes, where)
    for layer, parts in layers.items():
        base = base_shapes.get(f"{layer}.weight")
        if base is None or len(base) != 2 or layer.rpartition(".")[2] in _NOT_SERVED:
            raise ModelError(
                f"{where}: the base has no linear layer {layer} that can be adapted; this adapter belongs to another model"
            )
        num_out, num_in = base
        wanted = {
            "lora_A": [settings.rank, num_in],
            "lora_B": [num_out, settings.rank],
            "lora_magnitude_vector": [num_out],
        }
        for part, name in parts.items():
            if list(shapes[name]) != wanted[part]:
                raise ModelError(
                    f"{where}: {name} has shape {list(shapes[name])}, expected {wanted[part]} for this base and rank "
                    f"{settings.rank}; this adapter belongs to another model"
                )
    return layers


MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
MAX_NAME_CHARS = 512
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. dtype: as safetensors spells it, e.g. BF16."""

    dtype: str
    shape: list[int]


def header_length(prefix: bytes, where: str) -> int:
    """Length in bytes of the header, from a file's first 8 bytes. Raises ModelError for an impossible one."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) != 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise ModelError(
            f"{where} is not a valid safetensors file: its header is not 2 to {MAX_HEADER_BYTES} bytes long"
        )
    return length


def read_header(header: bytes, data_bytes: int, where: str) -> dict[str, TensorInfo]:
    """Reads and checks a header.

    Args:
        header: The JSON after the first 8 bytes.
        data_bytes: Size of the file after the header.
        where: The file's name in messages.

    Returns:
        The tensors by name.

    Raises:
        ModelError: The header is not JSON, or a name, type, shape or offset is impossible; tensors overlap, leave
            gaps or end beyond the file.
    """
    if data_bytes < 0:
        raise ModelError(f"{where} is not a valid safetensors file: its header is longer than the file")
    try:
        tree = strict_json.parse(header, max_bytes=MAX_HEADER_BYTES, max_depth=4)
    except ValueError as err:
        raise ModelError(f"{where} is not a valid safetensors file: its header can't be read: {err}") from None
    if not isinstance(tree, dict) or len(tree) > MAX_TENSORS:
        raise ModelError(
            f"{where} is not a valid safetensors file: its header is not a JSON object with at most {MAX_TENSORS:,} entries"
        )
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in tree.items():
        if name == "__metadata__":
            continue
        tensors[name], span = _read_entry(name, entry, where)
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ModelError(
                f"{where} is not a valid safetensors file: its tensors overlap or leave gaps at byte {min(begin, end)}"
            )
        end = stop
    if end != data_bytes:
        raise ModelError(f"{where} is damaged: its header describes {end} bytes of tensors, and it holds {data_bytes}")
    return tensors


def _read_entry(name: str, entry: Any, where: str) -> tuple[TensorInfo, tuple[int, int]]:
    shown = repr(name[:80])
    if len(name) > MAX_NAME_CHARS or not isinstance(entry, dict):
        raise ModelError(f"{where} is not a valid safetensors file: its header has an impossible entry {shown}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelError(f"{where}: the tensor {shown} has an unknown dtype; write it again with `ftray export`")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ModelError(f"{where}: the tensor {shown} has an impossible shape; write it again with `ftray export`")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ModelError(f"{where}: the tensor {shown} has impossible offsets; write it again with `ftray export`")
    begin, stop = offsets
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if stop - begin != num_bytes:
        raise ModelError(
            f"{where}: the tensor {shown} has {stop - begin} bytes, but its shape and dtype need {num_bytes}"
        )
    return TensorInfo(dtype, list(shape)), (begin, stop)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)
