"""Hostile adapters: directories in PEFT's format that an author gives to be served."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.hostile.case import Case, Place, cases_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "model.layers.0.q_proj"
A, B = (f"base_model.model.{LAYER}.lora_{part}.weight" for part in "AB")
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/small", "revision": None}
Change = Callable[[Any], object]


def load_adapter() -> None:
    """Loads `adapter/` over a base with one layer, as a replica does. Raises ModelError."""
    import torch

    from ftray.engine.transformers.mixed_lora import MixedLora

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.Module()
            layer.q_proj = torch.nn.Linear(8, 4, bias=False)
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList([layer])

        def get_output_embeddings(self) -> None:
            return None

    MixedLora(Base()).load("adapter", Path("adapter"))


def good_header() -> dict[str, Any]:
    """The header of a rank-2 adapter of the base above: A is [2, 8] and B [4, 2], in float32."""
    return {
        A: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]},
        B: {"dtype": "F32", "shape": [4, 2], "data_offsets": [64, 96]},
    }


def safetensors(header: bytes | dict[str, Any], data: bytes = bytes(96), length: int | None = None) -> bytes:
    """A file's bytes; length: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(place: Place, config: bytes | None = None, weights: bytes | None = None) -> Path:
    """Writes `adapter/` with a good file for each that is not given."""
    place.write(f"adapter/{CONFIG}", json.dumps(SETTINGS) if config is None else config)
    return place.write(f"adapter/{WEIGHTS}", safetensors(good_header()) if weights is None else weights).parent


def with_settings(**changes: Any) -> Callable[[Place], object]:
    return lambda place: write(place, config=json.dumps({**SETTINGS, **changes}).encode())


def with_header(change: Change) -> Callable[[Place], object]:
    def prepare(place: Place) -> None:
        header = good_header()
        change(header)
        write(place, weights=safetensors(header))

    return prepare


def replaced(name: str, make: Callable[[Path, Place], object]) -> Callable[[Place], object]:
    def prepare(place: Place) -> None:
        path = write(place) / name
        path.unlink()
        make(path, place)

    return prepare


SETTINGS_CASES: dict[str, dict[str, Any]] = {
    "rank-huge": {"r": 2**40},
    "rank-of-300-digits": {"r": 10**300},
    "rank-zero": {"r": 0},
    "rank-text": {"r": "2"},
    "rank-list": {"r": [2]},
    "rank-true": {"r": True},
    "alpha-huge": {"lora_alpha": 1e308},
    "alpha-text": {"lora_alpha": "4"},
    "kind-other": {"peft_type": "PROMPT_TUNING"},
    "kind-list": {"peft_type": []},
    "base-tree": {"base_model_name_or_path": {"a": {}}},
    "rank-pattern": {"rank_pattern": {"(a+)+$": 4}},
    "modules-to-save": {"modules_to_save": ["../../outside"]},
    "bias-all": {"bias": "all"},
    "layers-replicated": {"layer_replication": [[0, 10**9]]},
    "dora-text": {"use_dora": "yes"},
}
HARMLESS_SETTINGS: dict[str, dict[str, Any]] = {
    "auto-mapping-of-a-module": {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
    "base-elsewhere": {"base_model_name_or_path": "../../outside/secret.txt"},
    "target-modules-regex": {"target_modules": "(a+)+$" * 100},
}
CONFIG_CASES: dict[str, bytes] = {
    "config-empty": b"",
    "config-nested": b'{"r": ' + b"[" * 200_000,
    "config-list": b"[]",
    "config-nan": b'{"peft_type": "LORA", "r": NaN, "lora_alpha": 1}',
    "config-infinite": b'{"peft_type": "LORA", "r": 1e999, "lora_alpha": 1}',
    "config-huge-integer": b'{"peft_type": "LORA", "lora_alpha": 1, "r": ' + b"9" * 1_000_000 + b"}",
    "config-of-50-mb": b'{"x": "' + b"x" * 50_000_000 + b'"}',
    "config-bad-utf8": b'{"peft_type": "\xff"}',
    "config-terminal-escapes": b'{"peft_type": "\\u001b[2J\\u001b]0;x\\u0007", "r": 1, "lora_alpha": 1}',
}
WEIGHTS_CASES: dict[str, bytes] = {
    "weights-empty": b"",
    "weights-pickle": b"\x80\x04cposix\nsystem\n" * 100,
    "header-of-exabytes": safetensors(b"{}", length=2**63),
    "header-longer-than-the-file": safetensors(b"{}", length=1 << 24),
    "header-nested": safetensors(b'{"a": ' + b"[" * 200_000),
    "header-list": safetensors(b"[]"),
    "bytes-behind": safetensors(good_header(), bytes(1000)),
    "bytes-missing": safetensors(good_header(), bytes(10)),
    "weights-not-finite": safetensors(good_header(), b"\xff" * 96),
}
HEADER_CASES: dict[str, Change] = {
    "dtype-unknown": lambda h: h[A].update(dtype="OBJECT"),
    "dtype-integers": lambda h: h[A].update(dtype="I32"),
    "shape-overflow": lambda h: h[A].update(shape=[2**40, 2**40]),
    "shape-negative": lambda h: h[A].update(shape=[-2, 8]),
    "shape-text": lambda h: h[A].update(shape="28"),
    "offsets-overlap": lambda h: h[B].update(data_offsets=[32, 64]),
    "offsets-beyond": lambda h: h[B].update(data_offsets=[2**47, 2**47 + 32]),
    "offsets-negative": lambda h: h[A].update(data_offsets=[-64, 0]),
    "name-with-dots": lambda h: h.update({"../../outside/canary": h.pop(A)}),
    "name-of-a-megabyte": lambda h: h.update({"x" * 1_000_000: h.pop(A)}),
    "entries-without-end": lambda h: h.update({f"t{i}": {**h[A], "data_offsets": [96, 96]} for i in range(250_000)}),
}  # fmt: skip
FILE_CASES: dict[str, Callable[[Place], object]] = {
    "weights-without-end": replaced(WEIGHTS, lambda path, _: path.symlink_to("/dev/zero")),
    "config-a-pipe": replaced(CONFIG, lambda path, _: os.mkfifo(path)),
    "weights-a-directory": replaced(WEIGHTS, lambda path, _: path.mkdir()),
    "config-of-another": replaced(CONFIG, lambda path, place: path.symlink_to(place.outside / "secret.txt")),
    "weights-missing": replaced(WEIGHTS, lambda path, _: None),
}


@cases_of("adapters")
def adapters() -> Iterator[Case]:
    """Cases of the adapter's config, of its weights' header, and of what stands in place of its files."""
    for name, changes in SETTINGS_CASES.items():
        yield Case(name, with_settings(**changes), load_adapter)
    for name, changes in HARMLESS_SETTINGS.items():
        yield Case(name, with_settings(**changes), load_adapter, harmless=True)
    for name, content in CONFIG_CASES.items():
        yield Case(name, lambda place, content=content: write(place, config=content), load_adapter)
    for name, content in WEIGHTS_CASES.items():
        yield Case(name, lambda place, content=content: write(place, weights=content), load_adapter)
    for name, change in HEADER_CASES.items():
        yield Case(name, with_header(change), load_adapter)
    for name, prepare in FILE_CASES.items():
        yield Case(name, prepare, load_adapter)
