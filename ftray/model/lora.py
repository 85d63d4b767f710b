"""Adapters on a frozen base, by PEFT. Knows models; nothing of data or training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftray import config
from ftray.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def dtype_of(precision: str) -> torch.dtype:
    """torch's dtype for a value of `train.precision`."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[precision])
    return found


def build_model(model: config.Model, method: config.Method, precision: str, seed: int) -> Any:
    """What is trained: the base with all weights trainable, or a frozen base with seeded adapters in its own dtype."""
    from ftray.model.load import load_base

    base = load_base(model, dtype_of(precision), quantize=method.type == "qlora")
    if method.type == "full":
        return base.requires_grad_(True)
    return add_adapters(base, method, seed)


def add_adapters(base: PreTrainedModel, method: config.Method, seed: int) -> Any:
    """Wraps the base with LoRA adapters (Hu et al. 2021); A is seeded, B is zero. Raises ConfigError for no target.

    The adapters keep the base's dtype: PEFT's cast to float32 would cost a third of the speed, and the optimizer holds
    fp32 masters anyway.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.target_modules,
        task_type="CAUSAL_LM",
    )
    if torch.cuda.is_available():
        from ftray.model.lora_linear import fused_layers

        settings._register_custom_module(fused_layers(four_bit=method.type == "qlora"))
    torch.manual_seed(seed)
    try:
        return get_peft_model(base, settings, autocast_adapter_dtype=False)
    except ValueError as err:
        raise ConfigError(
            f"method.target_modules ({method.target_modules}): {str(err).splitlines()[0]}; use all-linear"
        ) from None


def check_targets(model: config.Model, method: config.Method) -> None:
    """Raises ConfigError for a name in target_modules that no linear layer of the base has. Loads no weights."""
    if method.type == "full" or isinstance(method.target_modules, str):
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model.load import resolve_base

    base = AutoConfig.from_pretrained(
        resolve_base(model), revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(base, trust_remote_code=model.trust_remote_code).named_modules()
    names = [name for name, layer in layers if isinstance(layer, torch.nn.Linear)]
    for target in method.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise ConfigError(
                f"method.target_modules: no linear layer of {model.base} is called {target}; its layers are {known}, "
                "or use all-linear"
            )


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
