"""A base's shape, from its config.json: how many weights, how many bytes a token's activations keep. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray import config
from ftray.errors import ModelError
from ftray.model.families import family_of
from ftray.model.load import resolve_base

NF4_BYTES = 0.516  # of a weight in 4 bits, with its doubly quantized scales
EIGHT_BIT_BYTES = 2.0  # of a weight in 8 bits: it is kept transposed, too
# Bases that are often asked for before they were downloaded: hidden, intermediate, layers, (heads, key-value heads), tied.
KNOWN = {
    "Llama-3.2-1B": (2048, 8192, 16, (32, 8), True),
    "Llama-3.2-3B": (3072, 8192, 28, (24, 8), True),
    "Llama-3.1-8B": (4096, 14336, 32, (32, 8), False),
    "Llama-3.1-70B": (8192, 28672, 80, (64, 8), False),
    "Llama-3.3-70B": (8192, 28672, 80, (64, 8), False),
}
LLAMA_VOCABULARY = 128256


@dataclass(frozen=True)
class ModelShape:
    """A causal language model of attention and gated feed-forward layers. query, key: widths of all heads together.

    whole_logits: they aren't computed a piece of the tokens at a time.
    """

    hidden: int
    intermediate: int
    num_layers: int
    query: int
    key: int
    vocabulary: int
    tied: bool
    whole_logits: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear layers, by name."""
        h, f = self.hidden, self.intermediate
        attention = {
            "q_proj": (h, self.query),
            "k_proj": (h, self.key),
            "v_proj": (h, self.key),
            "o_proj": (self.query, h),
        }
        return {**attention, "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    @property
    def in_layers(self) -> int:
        """Weights of all layers' linear layers: what is quantized."""
        return self.num_layers * sum(a * b for a, b in self.linears.values())

    @property
    def head(self) -> int:
        """Weights of the output head, which may be the embeddings."""
        return self.vocabulary * self.hidden

    @property
    def num_parameters(self) -> int:
        """All weights."""
        norms = (2 * self.num_layers + 1) * self.hidden
        return self.in_layers + norms + self.head * (1 if self.tied else 2)

    def num_trained(self, method: config.MethodConfig) -> int:
        """Weights that a method trains; what is frozen by name is not counted off."""
        if method.type == "full":
            return self.num_parameters
        if method.type == "prompt-tuning":
            return method.num_virtual_tokens * self.hidden
        wanted = None if method.target_modules == "all-linear" else tuple(method.target_modules)
        chosen = [size for name, size in self.linears.items() if wanted is None or name.endswith(wanted)]
        lengths = sum(out for _, out in chosen) if method.dora else 0
        return self.num_layers * (sum(method.rank * (a + b) for a, b in chosen) + lengths)

    def weight_bytes(self, method: config.MethodConfig, precision: str) -> float:
        """Bytes of all weights, base and trained."""
        own = 4 if precision == "fp32" else 2
        more = 0 if method.type == "full" else self.num_trained(method) * own
        each = NF4_BYTES if method.type == "qlora" else EIGHT_BIT_BYTES if method.base_precision is not None else own
        if method.base_precision == "int8":  # the down projection is kept in bf16, and transposed in int8
            more += (self.num_layers - 1) * self.hidden * self.intermediate
        return self.in_layers * each + (self.num_parameters - self.in_layers) * own + more

    def kept_bytes(self, precision: str) -> float:
        """Bytes that a token's activations keep for backward, where no layer is recomputed.

        Of each layer: its input, both norms' results, the middle sum; queries, keys, values, attention's result; gate, up
        and their product. Of whole logits, in fp32 whatever the precision, themselves.
        """
        layer = 4 * self.hidden + 2 * self.query + 2 * self.key + 3 * self.intermediate
        return (4 if precision == "fp32" else 2) * (self.num_layers * layer + 2 * self.hidden) + self._logits

    def recomputed_bytes(self, precision: str) -> float:
        """The same where all layers are: each one's input."""
        return (4 if precision == "fp32" else 2) * (self.num_layers + 2) * self.hidden + self._logits

    @property
    def _logits(self) -> float:
        return 4 * self.vocabulary if self.whole_logits else 0


def shape_of(model: config.ModelConfig) -> ModelShape:
    """Shape of a base, whose config.json is here, in the hub's cache, or which is known. Raises ModelError."""
    name = model.base.rsplit("/", 1)[-1].removesuffix("-Instruct")
    place = Path(resolve_base(model))
    if not place.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
        except ValueError:
            raise ModelError(f"model.base {model.base} is neither a directory here nor a hub id; correct it") from None
        if not isinstance(cached, str):
            if name in KNOWN:
                return _known(name)
            raise ModelError(
                f"model.base {model.base} is not on this machine, so that its shape is not known; download its config.json "
                f"(hf download {model.base} config.json), or give a directory"
            )
        place = Path(cached).parent
    return read_shape(json.loads((place / "config.json").read_text()), model.base)


def _known(name: str) -> ModelShape:
    hidden, intermediate, layers, (heads, keys), tied = KNOWN[name]
    width = hidden // heads
    return ModelShape(hidden, intermediate, layers, heads * width, keys * width, LLAMA_VOCABULARY, tied)


def read_shape(settings: Mapping[str, Any], base: str) -> ModelShape:
    """The shape of a config.json. Raises ModelError for a model with experts, or without the usual keys."""
    settings = settings.get("text_config", settings)
    family = family_of(settings)
    unplanned = family.unplanned
    try:
        hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
        width = settings.get("head_dim") or hidden // heads
        shape = ModelShape(
            hidden,
            settings["intermediate_size"],
            settings["num_hidden_layers"],
            heads * width,
            (settings.get("num_key_value_heads") or heads) * width,
            settings["vocab_size"],
            bool(settings.get("tie_word_embeddings", False)),
            family.whole_logits,
        )
    except (KeyError, TypeError):
        unplanned, shape = "its config.json", None
    if unplanned or shape is None:
        raise ModelError(
            f"model.base {base}: plan knows no models of this kind ({unplanned}); train it with train.max_steps=5 to see"
        )
    return shape
