"""Tensors by name in one safetensors file per writer, readable in any parts.

A part of a tensor is stored flat, and the file's metadata says where it belongs. So any number of readers can read the elements
that they need from the files of any number of writers.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftray import storage
from ftray.errors import CheckpointError
from ftray.storage import local
from ftray.storage.transfer import in_parallel

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE_BYTES = 16 << 20  # written and hashed at once
READ_AHEAD = 32  # parts read in parallel


class SplitFp32:
    """fp32 values that `adamw` keeps as bf16 and the 16 bits that it lacks; joined only while they are copied.

    Args:
        high: bf16 [elements].
        rest: int16 [elements].
    """

    dtype = torch.float32

    def __init__(self, high: torch.Tensor, rest: torch.Tensor) -> None:
        self._high, self._rest = high, rest
        self.nbytes = high.numel() * self.element_size()

    def element_size(self) -> int:
        """Bytes of an element."""
        return 4

    def numel(self) -> int:
        """Elements."""
        return self._high.numel()

    def whole(self) -> torch.Tensor:
        """The values, fp32 [elements]."""
        values = torch.empty(self.numel(), dtype=self.dtype)
        self.copy_to(values)
        return values

    def copy_to(self, target: torch.Tensor) -> None:
        """Writes the values into fp32 [elements], a piece at a time."""
        for at in range(0, self.numel(), PIECE_BYTES):
            piece = slice(at, at + PIECE_BYTES)
            bits = (self._high[piece].view(torch.int16).to(torch.int32) << 16) + self._rest[piece]
            target[piece].copy_(bits.view(torch.float32), non_blocking=True)


@dataclass(frozen=True)
class TensorPart:
    """Elements [start, start + len(values)) of the tensor `name` of `shape`, flattened. values: [elements]."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: torch.Tensor | SplitFp32

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.start == 0 and self.values.numel() == math.prod(self.shape)


class HostBuffer:
    """Host memory that is kept between checkpoints: allocating it again costs four times the copy itself."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num: int) -> None:
        """Allocates `num` bytes and writes to them: the system provides memory at the first write."""
        if self._bytes.numel() < num:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._bytes = torch.empty(num, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).zero_()

    def hold(self, parts: list[TensorPart]) -> list[TensorPart]:
        """Copies parts into this buffer, one after the other, wide types first. They are valid until the next call."""
        parts = sorted(parts, key=lambda part: -part.values.element_size())  # keeps each aligned
        total = sum(part.values.nbytes for part in parts)
        self.reserve(total)
        held, at = [], 0
        for part in parts:
            target = self._bytes[at : at + part.values.nbytes].view(part.values.dtype)
            if isinstance(part.values, SplitFp32):
                part.values.copy_to(target)
            else:
                target.copy_(part.values, non_blocking=True)
            held.append(TensorPart(part.name, part.shape, part.start, target))
            at += part.values.nbytes
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return held

    def first(self, num: int) -> torch.Tensor:
        """The first bytes of the buffer, uint8."""
        return self._bytes[:num]


Layout = dict[str, list[Any]]  # name → [dtype, shape, start, elements], in the order of the values


def layout(parts: list[TensorPart]) -> Layout:
    """Describes parts without their values."""
    return {p.name: [NAMES[p.values.dtype], list(p.shape), p.start, p.values.numel()] for p in parts}


def num_bytes(laid: Layout) -> int:
    """Bytes of the values of a layout."""
    return sum(elements * DTYPES[dtype].itemsize for dtype, _, _, elements in laid.values())


def assemble(layouts: list[Layout], shares: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors by name from the bytes of all writers (uint8, described by `layouts`)."""
    whole: dict[str, torch.Tensor] = {}
    for laid, share in zip(layouts, shares, strict=True):
        at = 0
        for name, (dtype, shape, start, elements) in laid.items():
            size = elements * DTYPES[dtype].itemsize
            if name not in whole:
                whole[name] = torch.empty(shape, dtype=DTYPES[dtype])
            whole[name].view(-1)[start : start + elements] = share[at : at + size].view(DTYPES[dtype])
            at += size
    return whole


def write_parts(path: Path, laid: Layout, chunks: Iterable[memoryview]) -> str:
    """Writes one file of parts whose bytes come in `chunks`, in order; returns its sha256 (hex). Raises StorageError."""
    header: dict[str, Any] = {}
    starts, at = {}, 0
    for name, (dtype, shape, start, elements) in laid.items():
        size = elements * DTYPES[dtype].itemsize
        is_whole = start == 0 and elements == math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape if is_whole else [elements], "data_offsets": [at, at + size]}
        if not is_whole:
            starts[name] = [start, shape]
        at += size
    if starts:
        header["__metadata__"] = {"parts": json.dumps(starts)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with local.guarded(str(path), "written"), path.open("wb") as file:
        for chunk in (memoryview(struct.pack("<Q", len(text)) + text), *chunks):
            digest.update(chunk)
            file.write(chunk)
            written += len(chunk)
    if written != 8 + len(text) + at:
        raise CheckpointError(f"{path}: {written} bytes instead of {8 + len(text) + at}; this is a bug in ftray")
    return digest.hexdigest()


def pieces(flat: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a flat tensor in host memory, a piece at a time, not copied."""
    view = memoryview(flat.view(torch.uint8).numpy())
    for at in range(0, len(view), PIECE_BYTES):
        yield view[at : at + PIECE_BYTES]


def check_complete(layouts: list[Layout]) -> None:
    """Raises CheckpointError unless the parts of all writers form whole, non-empty tensors, with weights among them."""
    parts: dict[str, list[list[Any]]] = {}
    for laid in layouts:
        for name, entry in laid.items():
            parts.setdefault(name, []).append(entry)
    if not any(name.startswith("weights.") for name in parts):
        raise CheckpointError("there are no weights to save; this is a bug in ftray, please report it")
    for name, entries in parts.items():
        at, size = 0, math.prod(entries[0][1])
        for _, _, start, elements in sorted(entries, key=lambda entry: int(entry[2])):
            if start != at:
                break
            at += elements
        if at != size or size == 0:
            problem = "is empty" if size == 0 else f"has only {at} of {size} contiguous elements"
            raise CheckpointError(f"the tensor {name} {problem}; this is a bug in ftray, please report it")


@dataclass(frozen=True)
class _PartLocation:
    uri: str
    offset: int  # of the part's first byte in the file
    start: int
    elements: int


class TensorPartReader:
    """Reads elements of the tensors in the safetensors files of a directory, committed or not."""

    def __init__(self, uri: str) -> None:
        self._locations: dict[str, list[_PartLocation]] = {}
        self._kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        manifest = storage.read_manifest(uri)
        for info in storage.list_files(uri, suffix=".safetensors"):
            if manifest is None or info.path in manifest["files"]:  # other files were never committed
                self._read_header(info.uri, info.size_bytes)

    def _read_header(self, uri: str, size_bytes: int) -> None:
        try:
            (size,) = struct.unpack("<Q", storage.read_range(uri, 0, 8))
            if size > size_bytes - 8:
                raise ValueError(f"its header says {size} bytes, the file has {size_bytes}")
            header = json.loads(storage.read_range(uri, 8, 8 + size))
            starts = json.loads(header.pop("__metadata__", {}).get("parts", "{}"))
            for name, entry in header.items():
                start, shape = starts.get(name, (0, entry["shape"]))
                location = _PartLocation(uri, 8 + size + entry["data_offsets"][0], start, math.prod(entry["shape"]))
                self._locations.setdefault(name, []).append(location)
                self._kinds[name] = (DTYPES[entry["dtype"]], tuple(shape))
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as err:
            raise CheckpointError(f"{uri} is damaged ({err}); use the previous checkpoint") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        return {name: shape for name, (_, shape) in self._kinds.items()}

    def read(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Elements [start, end) of a flattened tensor. Raises CheckpointError if some are missing."""
        if name not in self._kinds:
            raise CheckpointError(f"the checkpoint has no {name}; it belongs to another model")
        dtype, shape = self._kinds[name]
        end = math.prod(shape) if end is None else end
        out, num_read = torch.empty(end - start, dtype=dtype), 0
        for location in self._locations[name]:
            lo, hi = max(start, location.start), min(end, location.start + location.elements)
            if lo < hi:
                first = location.offset + (lo - location.start) * dtype.itemsize
                data = storage.read_range(location.uri, first, first + (hi - lo) * dtype.itemsize)
                if len(data) == (hi - lo) * dtype.itemsize:
                    out[lo - start : hi - start] = torch.frombuffer(bytearray(data), dtype=dtype)
                    num_read += hi - lo
        if num_read != end - start:
            raise CheckpointError(f"the checkpoint has {num_read} of {end - start} elements of {name}; it is damaged")
        return out

    def read_many(self, ranges: list[tuple[str, int, int]]) -> Iterator[torch.Tensor]:
        """`read` for each (name, start, end), in order, with read-ahead."""
        for at in range(0, len(ranges), READ_AHEAD):
            yield from in_parallel(lambda item: self.read(*item), ranges[at : at + READ_AHEAD])

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in its shape."""
        return self.read(name).reshape(self._kinds[name][1])
