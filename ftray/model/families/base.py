"""The adapter of a model family, and the registry that finds a model's family by its config.

A family is registered for model types (`config.model_type`) or for a structure, a predicate over the text config. Model types
take precedence over structures; the default is dense. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from ftray import config

# Kinds that scale, cap or shift their logits, which are then whole in memory (`objectives.base.is_plain` decides it for a model).
WHOLE_LOGITS = {"cohere", "cohere2", "falcon_h1", "minicpm3", "phi", "recurrent_gemma"}


class ModelFamily:
    """What the rest of ftray asks about a kind of model. The defaults are those of a dense model.

    Args:
        settings: The model's text config as a dictionary, from its config.json or `to_dict()`.
    """

    name: ClassVar[str]
    max_leaks: ClassVar[tuple[float, float]] = (1e-4, 2e-2)  # relative loss change in the packing check: fp32, 16 bits
    packing_fallback: ClassVar[str] = "sdpa"  # attention for classes that drop the documents' lengths

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def attention(self, model_config: Any) -> str:
        """Name of the attention function for this machine; see `attention.choose_attention`."""
        from ftray.model.attention import choose_attention

        return choose_attention(model_config)

    def document_inputs(self, cu_seqlens: torch.Tensor, max_length: int) -> dict[str, Any]:
        """Arguments of the model's forward that tell its layers where documents begin, besides `position_ids`.

        On CPUs there are none: transformers builds a block-diagonal causal mask from positions that restart.

        Args:
            cu_seqlens: int32 [documents + 1].
            max_length: Tokens of the longest document.
        """
        if not cu_seqlens.is_cuda:
            return {}
        lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        return {**lengths, "max_length_q": max_length, "max_length_k": max_length}

    def adapter_targets(self, method: config.MethodConfig) -> str | list[str]:
        """`target_modules` for PEFT: all linear layers but the output head, or the names of the run file."""
        return method.target_modules

    def computes_in_8_bits(self, layer: str) -> bool:
        """Whether a linear layer takes part in `method.base_precision`: attention and routers stay in bf16.

        Rounding these costs far more loss than their share of the arithmetic (docs/benchmarks.md).
        """
        return not layer.endswith(".gate") and not any(word in layer for word in ("attn", "attention", "router"))

    def max_leak(self, in_fp32: bool) -> float:
        """Largest relative change of a document's loss by its neighbors that the packing check accepts."""
        return self.max_leaks[0 if in_fp32 else 1]

    @property
    def whole_logits(self) -> bool:
        """Whether the planner expects the logits of all tokens in memory at once."""
        scaled = self.settings.get("logits_scaling", 1.0) != 1.0 or bool(self.settings.get("final_logit_softcapping"))
        return scaled or self.settings.get("model_type") in WHOLE_LOGITS

    @property
    def unplanned(self) -> str | None:
        """Key of the config because of which `ftray plan` does not know the memory of this model."""
        return None

    @property
    def caps_attention(self) -> bool:
        """Whether attention scores are soft-capped, as in Gemma 2."""
        return self.settings.get("attn_logit_softcapping") is not None


Structure = Callable[[Mapping[str, Any]], bool]
_BY_TYPE: dict[str, type[ModelFamily]] = {}
_BY_STRUCTURE: list[tuple[Structure, type[ModelFamily]]] = []
_DEFAULT: list[type[ModelFamily]] = []


def register(
    family: type[ModelFamily],
    model_types: tuple[str, ...] = (),
    structure: Structure | None = None,
    default: bool = False,
) -> None:
    """Registers a family for model types, for configs of a structure, or as the default. The first structure wins."""
    _BY_TYPE.update(dict.fromkeys(model_types, family))
    if structure is not None:
        _BY_STRUCTURE.append((structure, family))
    if default:
        _DEFAULT[:] = [family]


def family_of(model_config: Any) -> ModelFamily:
    """The family of a transformers config or of the dictionary of a config.json."""
    if not isinstance(model_config, Mapping):
        model_config = model_config.get_text_config().to_dict()
    settings = model_config.get("text_config", model_config)
    family = _BY_TYPE.get(str(settings.get("model_type")))
    if family is None:
        family = next((each for structure, each in _BY_STRUCTURE if structure(settings)), None)
    return (family or _DEFAULT[0])(settings)


def expert_key(settings: Mapping[str, Any]) -> str | None:
    """The key of a config that gives its number of experts; None without experts."""
    return next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if settings.get(key)), None)


def layers_of(model: Any) -> dict[str, Any]:
    """The blocks of a model by name, in order: units of checkpointing, gathering and quantization.

    Empty if a model is not built of transformers' own blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
