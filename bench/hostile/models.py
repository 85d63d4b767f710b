"""Hostile models: templates, tokenizers, configs, indexes and weights of a directory that `model.base` names."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.hostile.case import Case, Place, cases_of
from bench.hostile.templates import IN_C


def check_model() -> None:
    """What every command does with `model.base` before a worker starts."""
    from ftray.config import ModelConfig
    from ftray.model.load import check_base

    check_base(ModelConfig(base="model"))


def load_model() -> None:
    """What each worker does with it."""
    import torch

    from ftray.config import ModelConfig
    from ftray.model.load import load_base

    load_base(ModelConfig(base="model"), torch.float32)


def try_template_of_model() -> None:
    """Tries the template in a process of its own, and renders a conversation with it."""
    from ftray.chat import Conversation, Message, try_template
    from ftray.chat.renderer import TemplateRenderer

    source = Path("template.jinja").read_text()
    try_template(source)
    TemplateRenderer(source, {}).render(Conversation((Message("user", "hello there"),)))


@lru_cache(maxsize=1)
def _whole() -> Path:
    from tests import tiny

    return tiny.write_tiny_model(Path(tempfile.mkdtemp(prefix="ftray-hostile-model-")) / "model")


def _model(change: Callable[[Path], object]) -> Callable[[Place], object]:
    def prepare(place: Place) -> None:
        shutil.copytree(_whole(), place.directory / "model")
        shutil.copy(_whole() / "model.safetensors", place.outside / "x.safetensors")
        change(place.directory / "model")

    return prepare


def _json(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = directory / name
        tree = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(tree | changes))

    return change


def _bytes(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def _pickled_weights(directory: Path) -> None:
    """Weights in PyTorch's pickle format, whose payload creates the canary, and no safetensors."""
    import pickle

    from bench.hostile.data import Payload

    (directory / "model.safetensors").unlink()
    payload = pickle.dumps(Payload(directory.parents[1] / "outside" / "canary"))
    (directory / "pytorch_model.bin").write_bytes(payload)


def _own_code(directory: Path) -> None:
    canary = directory.parents[1] / "outside" / "canary"
    (directory / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\nclass C: pass\n")
    _json(
        "config.json", model_type="x", auto_map={"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.X"}
    )(directory)


def _own_tokenizer(directory: Path) -> None:
    canary = directory.parents[1] / "outside" / "canary"
    (directory / "tok.py").write_text(f"open({str(canary)!r}, 'w')\nclass T: pass\n")
    names = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tok.T", "tok.T"]}}
    _json("tokenizer_config.json", **names)(directory)
    (directory / "tokenizer.json").unlink()


def _not_finite(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _header(header: bytes, length: int | None = None) -> Callable[[Path], object]:
    size = len(header) if length is None else length
    return _bytes("model.safetensors", struct.pack("<Q", size) + header + bytes(64))


KERNEL = "org/kernel"
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}
INDEX = "model.safetensors.index.json"
CHANGES: dict[str, Callable[[Path], object]] = {
    "kernel": _json("config.json", _attn_implementation=KERNEL),
    "kernel-plain-key": _json("config.json", attn_implementation=KERNEL),
    "kernel-nested": _json("config.json", text_config={"_attn_implementation": KERNEL}),
    "kernel-experts": _json("config.json", _experts_implementation=KERNEL),
    "own-code": _own_code,
    "own-tokenizer-code": _own_tokenizer,
    "pickled-weights": _pickled_weights,
    "index-parent": _json(INDEX, weight_map={"a": "../../outside/x.safetensors"}),
    "index-absolute": _json(INDEX, weight_map={"a": "/etc/passwd"}),
    "index-list": _bytes(INDEX, b"[]"),
    "index-number": _json(INDEX, weight_map={"a": 5}),
    "index-missing-file": _json(INDEX, weight_map={"a": "none.safetensors"}),
    "weights-elsewhere": _json("config.json", transformers_weights="../../outside/x.safetensors"),
    "vocabulary-elsewhere": _json("tokenizer_config.json", vocab_file="../../outside/secret.txt"),
    "replace-megabytes": _json("tokenizer.json", normalizer=REPLACE | {"content": "x" * 5_000_000}),
    "replace-chain": _json("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [REPLACE] * 30}),
    "replace-decoder": _json("tokenizer.json", decoder={"type": "Sequence", "decoders": [REPLACE] * 30}),
    "prepend-megabytes": _json("tokenizer.json", normalizer={"type": "Prepend", "prepend": "x" * 5_000_000}),
    "tokenizer-not-json": _bytes("tokenizer.json", b"{"),
    "tokenizer-deep": _bytes("tokenizer.json", b'{"a":' * 50_000),
    "tokenizer-list": _bytes("tokenizer.json", b"[]"),
    "tokenizer-unknown-model": _json("tokenizer.json", model={"type": "Evil"}),
    "tokenizer-empty-vocabulary": _json("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}),
    "tokenizer-negative-id": _json("tokenizer.json", model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "config-not-json": _bytes("config.json", b"{"),
    "config-deep": _bytes("config.json", b'{"a":' * 50_000),
    "config-list": _bytes("config.json", b"[]"),
    "config-unknown-type": _json("config.json", model_type="../../x"),
    "config-type-is-list": _json("config.json", model_type=["llama"]),
    "config-sizes-are-text": _json("config.json", hidden_size="large"),
    "config-dtype": _json("config.json", dtype="os.system"),
    "config-large": _bytes("config.json", b'{"a": "' + b"x" * 40_000_000 + b'"}'),
    "vocabulary-beyond-embeddings": _json("config.json", vocab_size=3),
    "template-list": _bytes("chat_template.jinja", b"{% for a in range(10**9) %}{% endfor %}"),
    "template-import": _bytes("chat_template.jinja", b"{% import 'os' as os %}{{ os.system('x') }}"),
    "template-globals": _bytes("chat_template.jinja", b"{{ raise_exception.__globals__ }}"),
    "header-too-long": _header(b"{}", 1 << 60),
    "header-not-json": _header(b"{" * 8),
    "header-offsets": _header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}}'),
    "header-shape": _header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}'),
    "header-cut": _bytes("model.safetensors", b"\x10"),
    "weights-empty": _bytes("model.safetensors", b""),
}


@cases_of("models")
def model_cases() -> Iterator[Case]:
    """Directories, looked at as before a run; weights, loaded; templates, tried."""
    for name, change in CHANGES.items():
        yield Case(name, _model(change), check_model)
    yield Case("weight-not-a-number", _model(_not_finite), load_model)
    for name, source in IN_C.items():
        yield Case(f"template-{name.replace(' ', '-')}", _template(source), try_template_of_model)


def _template(source: str) -> Callable[[Place], object]:
    return lambda place: place.write("template.jinja", source)
