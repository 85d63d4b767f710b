"""Prepares a base for training: all weights except frozen ones, or LoRA adapters or prompt tuning on a frozen base (PEFT)."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ftray import config
from ftray.compat.peft import register_layers
from ftray.errors import ConfigError
from ftray.model.families import family_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_of(precision: str) -> torch.dtype:
    """torch's dtype for a value of `train.precision`."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    return dtype


def build_model(
    model: config.ModelConfig, method: config.MethodConfig, precision: str, seed: int, outline: bool = False
) -> Any:
    """The model to train: a base with trainable weights, or a frozen base with seeded adapters or a prompt.

    Args:
        model: The section `model`.
        method: The section `method`.
        precision: dtype of the weights, as in `train.precision`.
        seed: Seed of adapters and prompts.
        outline: Without values, on torch's meta device.

    Raises:
        ConfigError: A name in `method.freeze` or `method.target_modules` matches nothing, or everything.
    """
    from ftray.model.load import load_base, outline_base

    if outline:
        base = outline_base(model, dtype_of(precision))
    else:
        base = load_base(model, dtype_of(precision), quantize=method.type == "qlora")
    if method.type == "full":
        frozen = set(frozen_names([name for name, _ in base.named_parameters()], method.freeze))
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return base
    return add_prompt(base, method, seed) if method.type == "prompt-tuning" else add_adapters(base, method, seed)


def frozen_names(names: list[str], patterns: list[str]) -> list[str]:
    """The parameters that `method.freeze` names; a pattern matches consecutive parts of a name.

    Raises ConfigError for a pattern that matches nothing, and if nothing is left to train.
    """
    frozen: set[str] = set()
    for pattern in patterns:
        regex = re.compile(r"(?:^|.*\.)" + re.escape(pattern).replace(r"\*", r"[^.]*") + r"(?:\..*|$)")
        matches = [name for name in names if regex.match(name)]
        if not matches:
            known = sorted({re.sub(r"\d+", "*", name) for name in names})
            close = get_close_matches(pattern, known, 3, 0.0)
            raise ConfigError(
                f"method.freeze: {pattern} matches no parameter; similar names are {', '.join(close)}; correct or remove it"
            )
        frozen.update(matches)
    if len(frozen) == len(names):
        raise ConfigError("method.freeze leaves nothing to train; remove one of its patterns")
    return [name for name in names if name in frozen]


def add_prompt(base: PreTrainedModel, method: config.MethodConfig, seed: int) -> Any:
    """Wraps the base with prompt tuning; the prompt is initialized with embeddings of random tokens.

    The objective `PromptTuning` puts the prompt in front of every document. It has the base's dtype, as adapters do.

    Source:
        Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning.
    """
    import torch
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

    settings = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=method.num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )
    torch.manual_seed(seed)
    dtype = base.get_input_embeddings().weight.dtype
    tuned = get_peft_model(base, settings, autocast_adapter_dtype=False)
    tuned.prompt_encoder.to(dtype)  # PEFT makes it float32 for every base
    return tuned


def add_adapters(base: PreTrainedModel, method: config.MethodConfig, seed: int) -> Any:
    """Wraps the base with LoRA adapters; A is seeded, B is zero.

    The adapters have the base's dtype: PEFT's cast to float32 would cost a third of the speed, and the optimizer has fp32
    master weights anyway.

    Raises:
        ConfigError: `method.target_modules` matches no layer.

    Source:
        Hu et al. 2021, LoRA.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=family_of(base.config).adapter_targets(method),
        use_rslora=method.rslora,
        use_dora=method.dora,
        task_type="CAUSAL_LM",
    )
    if torch.cuda.is_available():
        from ftray.model.lora_linear import fused_layers

        register_layers(settings, fused_layers(four_bit=method.type == "qlora"))
    torch.manual_seed(seed)
    try:
        return get_peft_model(base, settings, autocast_adapter_dtype=False)
    except ValueError as err:
        raise ConfigError(
            f"method.target_modules ({method.target_modules}): {str(err).splitlines()[0]}; use all-linear"
        ) from None


def check_targets(model: config.ModelConfig, method: config.MethodConfig) -> None:
    """Raises ConfigError for a name in target_modules or freeze that matches nothing. Loads no weights."""
    has_targets = method.type in ("lora", "qlora") and not isinstance(method.target_modules, str)
    if not has_targets and not method.freeze:
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model.load import checked_revision, resolve_base

    location = resolve_base(model)
    base = AutoConfig.from_pretrained(
        location, revision=checked_revision(model, location), trust_remote_code=model.trust_remote_code
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(base, trust_remote_code=model.trust_remote_code)
    frozen_names([name for name, _ in empty.named_parameters()], method.freeze)
    names = [name for name, layer in empty.named_modules() if isinstance(layer, torch.nn.Linear)]
    for target in method.target_modules if has_targets else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise ConfigError(
                f"method.target_modules: {model.base} has no linear layer named {target}; its layers are {known}. Correct it, or "
                "use all-linear"
            )


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
