"""Base model and tokenizer, from a hub, a directory or the embedded package. Knows nothing of data or training.

Only safetensors are read, and no code that comes with a model runs unless the run file says so.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray import config, storage
from ftray.errors import ModelError
from ftray.model import embedded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def resolve_base(model: config.Model) -> str:
    """Local directory or hub id of `model.base`. Raises ModelError for a directory that holds no model."""
    base = model.base
    if base.startswith("embedded:"):
        return embedded.resolve(base, storage.cache_directory())
    looks_local = base.startswith((".", "/", "~")) or Path(base).expanduser().is_dir()
    if not looks_local:
        return base
    directory = Path(base).expanduser()
    if not directory.is_dir():
        raise ModelError(f"model.base {base} is not a directory; correct the path, or give a hub id like org/name")
    for needed, pattern in (
        ("config.json", "config.json"),
        ("weights", "*.safetensors"),
        ("a tokenizer", "tokenizer*"),
    ):
        if not any(directory.glob(pattern)):
            raise ModelError(
                f"model.base {base} is no model directory: it has no {needed} ({pattern}); give one saved by save_pretrained"
            )
    return str(directory.resolve())


def absolute_base(model: config.Model) -> config.Model:
    """The same base for processes with another working directory, as Ray's workers have. Raises as `resolve_base`."""
    if model.base.startswith("embedded:"):
        return model  # each machine has its own cache
    return model.model_copy(update={"base": resolve_base(model)})


def load_tokenizer(model: config.Model) -> Any:
    """The base's tokenizer. Raises ModelError when it can't be had or is not a fast one."""
    from transformers import AutoTokenizer

    base = resolve_base(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(_explain(model, "tokenizer", err)) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.base {model.base} has no fast tokenizer (tokenizer.json); convert it, or use another base"
        )
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of a tokenizer with its chat template: twelve hex digits."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_base(model: config.Model, dtype: torch.dtype, quantize: bool = False) -> PreTrainedModel:
    """The base as a causal language model in `dtype` on the CPU, or in 4 bits (nf4, double quantization).

    Raises ModelError when it can't be had or isn't a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from ftray.model.attention import choose_attention
    from ftray.model.kernels import apply_kernels

    quantization = None
    if quantize:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = resolve_base(model)
    try:
        found = AutoConfig.from_pretrained(base, revision=model.revision, trust_remote_code=model.trust_remote_code)
        apply_kernels(found.model_type)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=choose_attention(found),
            quantization_config=quantization,
        )
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(_explain(model, "model", err)) from None
    loaded.config.use_cache = False
    return loaded


def check_base(model: config.Model) -> None:
    """Fails early, before any worker starts, if the base isn't a causal language model. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = resolve_base(model)
    try:
        found = AutoConfig.from_pretrained(base, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as err:
        raise ModelError(_explain(model, "config", err)) from None
    if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not model.trust_remote_code:
        raise ModelError(f"model.base {model.base} is of type {found.model_type}, no causal language model; use one")


def _explain(model: config.Model, what: str, err: Exception) -> str:
    first = " ".join(str(err).split())[:240]
    return f"model.base {model.base}: its {what} can't be loaded ({first}); check the name, the revision and access to the hub"
