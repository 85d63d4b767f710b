"""Private APIs of transformers. Seen with transformers 5.17 and 5.19; contract tests: tests/unit/test_compat.py."""

from __future__ import annotations

from typing import Any


def attention_of(model_config: Any) -> str:
    """Name of the attention function that a model's config selects.

    Reason: the name can be set (`set_attn_implementation`) but not read through a public attribute.
    """
    return str(model_config._attn_implementation)


def attention_in_file(model_config: Any) -> str | None:
    """The attention function that a config.json names; `to_dict()` leaves it out.

    Reason: it must be checked before a model is built: a name may stand for code on the hub.
    """
    name: str | None = getattr(model_config, "_attn_implementation_internal", None)
    return name


def causal_class(model_config: Any) -> Any:
    """The causal language model class of a config; None if the model brings its own code.

    Reason: `AutoModelForCausalLM` builds a model, but does not return its class. Upstream: models/auto/auto_factory.py.
    """
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping.get(type(model_config), None)
    return kind[0] if isinstance(kind, (tuple, list)) else kind


def attention_support(kind: Any) -> tuple[bool, bool]:
    """(whether a model class takes sdpa, whether it takes attention functions registered with AttentionInterface).

    Reason: classes say it in private attributes only. A class that brings its own code is taken to support both.
    """
    return getattr(kind, "_supports_sdpa", True), getattr(kind, "_supports_attention_backend", True)


def fp32_parts(model: Any, in_fp16: bool) -> set[str]:
    """Parts of parameter names that transformers keeps in fp32 whenever it loads a model (routers' corrections).

    Reason: the lists are class attributes without a public name. The second one applies to fp16 only.
    """
    parts = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return parts | set(getattr(model, "_keep_in_fp32_modules", None) or ()) if in_fp16 else parts
