"""The header of a safetensors file, checked before a library or the engine reads a tensor of it. Plain Python.

A header comes from whoever wrote the file: its length, names, shapes, types and offsets are all bounded here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from ftray.errors import ModelError
from ftray.storage import strict_json

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
        raise ModelError(f"{where} is no safetensors file: its header is not 2 to {MAX_HEADER_BYTES} bytes long")
    return length


def read_header(header: bytes, data_bytes: int, where: str) -> dict[str, TensorInfo]:
    """Reads and checks a header.

    Args:
        header: The JSON behind the first 8 bytes.
        data_bytes: Size of the file behind the header.
        where: What messages call the file.

    Returns:
        The tensors by name.

    Raises:
        ModelError: The header is not JSON, or a name, type, shape or offset is impossible; tensors overlap, leave gaps
            or end beyond the file.
    """
    if data_bytes < 0:
        raise ModelError(f"{where} is no safetensors file: its header is longer than the file")
    try:
        tree = strict_json.parse(header, max_bytes=MAX_HEADER_BYTES, max_depth=4)
    except ValueError as err:
        raise ModelError(f"{where} is no safetensors file: its header can't be read: {err}") from None
    if not isinstance(tree, dict) or len(tree) > MAX_TENSORS:
        raise ModelError(f"{where} is no safetensors file: its header is no object of at most {MAX_TENSORS} tensors")
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
                f"{where} is no safetensors file: its tensors overlap or leave gaps at byte {min(begin, end)}"
            )
        end = stop
    if end != data_bytes:
        raise ModelError(f"{where} is damaged: its header describes {end} bytes of tensors, and it holds {data_bytes}")
    return tensors


def _read_entry(name: str, entry: Any, where: str) -> tuple[TensorInfo, tuple[int, int]]:
    shown = repr(name[:80])
    if len(name) > MAX_NAME_CHARS or not isinstance(entry, dict):
        raise ModelError(f"{where} is no safetensors file: its header has an impossible entry {shown}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelError(f"{where}: the tensor {shown} has an unknown dtype; write it again with `ftray export`")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ModelError(f"{where}: the tensor {shown} has an impossible shape; write it again with `ftray export`")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ModelError(f"{where}: the tensor {shown} has impossible offsets; write it again with `ftray export`")
    begin, stop = offsets
    if stop - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ModelError(f"{where}: the tensor {shown} has {stop - begin} bytes, which its shape and dtype don't give")
    return TensorInfo(dtype, list(shape)), (begin, stop)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)
