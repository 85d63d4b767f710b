"""Quantizes whole weights to 4 or 8 bits, as a directory that transformers and vLLM load.

nf4 and int8 use bitsandbytes (4-bit NormalFloat with double quantization; LLM.int8). fp8 uses compressed-tensors: e4m3 weights
with a scale per row, activations with a dynamic scale per token, so that no calibration data is needed. Output head and
embeddings are not quantized. All three work on CPUs and GPUs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.errors import ConfigError, ModelError
from ftray.model.lora import dtype_of

if TYPE_CHECKING:
    import torch

KINDS = {  # kind → required module, package to install, description
    "nf4": ("bitsandbytes", "bitsandbytes", "4-bit NormalFloat (bitsandbytes)"),
    "int8": ("bitsandbytes", "bitsandbytes", "8-bit integers (bitsandbytes)"),
    "fp8": ("compressed_tensors", "'ftray[quantize]'", "8-bit floats, e4m3 (compressed-tensors)"),
}


@dataclass(frozen=True)
class QuantizationResult:
    """The result of a quantization.

    Attributes:
        kind: nf4, int8 or fp8.
        loss_before: Eval loss per trained token in nats; None without an eval set.
        loss_after: The same of the quantized model.
        num_trained_tokens: Trained tokens of the eval set.
        bytes_before: Bytes of the weights.
        bytes_after: The same of the quantized model.
    """

    kind: str
    loss_before: float | None
    loss_after: float | None
    num_trained_tokens: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        sizes = f"weights {self.bytes_before / 1e6:,.1f} → {self.bytes_after / 1e6:,.1f} MB"
        if self.loss_before is None or self.loss_after is None:
            return (
                f"{self.kind}: {sizes}; the change of the loss is unknown, because the run has no eval set (data.eval)"
            )
        change = self.loss_after - self.loss_before
        return (
            f"{self.kind}: eval loss {self.loss_before:.4f} → {self.loss_after:.4f} ({change:+.4f}, over "
            f"{self.num_trained_tokens} trained tokens); {sizes}"
        )


def check_quantize(kind: str) -> None:
    """Raises ConfigError if the library of a kind is not installed."""
    module, package, _ = KINDS[kind]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"--quantize {kind} needs {module}, which is not installed: pip install {package}")


def quantize(source: Path, target: Path, kind: str, precision: str, device: torch.device) -> None:
    """Writes the model of directory `source` with its tokenizer to `target`, quantized.

    precision: Of the layers that are not quantized. Raises ModelError for a model without a layer to quantize.
    """
    from transformers import AutoTokenizer, BitsAndBytesConfig

    if kind == "fp8":
        _write_fp8(load_saved(source, precision, device), target)
    else:
        settings = (
            BitsAndBytesConfig(load_in_8bit=True)
            if kind == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype_of(precision),
            )
        )
        load_saved(source, precision, device, settings).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def load_saved(directory: Path, precision: str, device: torch.device, quantization: Any = None) -> Any:
    """The causal language model of a directory, quantized or not, on the device and in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model.families import family_of

    settings = AutoConfig.from_pretrained(directory)
    options = {} if quantization is None else {"quantization_config": quantization}  # None hides the directory's own
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype_of(precision),
        use_safetensors=True,
        attn_implementation=family_of(settings).attention(settings),
        device_map={"": device},
        **options,
    )
    if hasattr(
        model, "ct_decompress_hook"
    ):  # else its first forward would do it, and the loss calls parts of the model
        model.hf_quantizer.compressor.decompress_model(model=model)
    return model.eval()


def _write_fp8(model: Any, target: Path) -> None:
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    head = model.get_output_embeddings()
    ignored = [name for name, module in model.named_modules() if module is head]
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"linear": scheme}, ignore=ignored))
    layers = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
    if not layers:
        raise ModelError("--quantize fp8: the model has no linear layers besides its output head; use nf4 or int8")
    with torch.no_grad():
        for layer in layers:
            low, high = layer.weight.amin(1, keepdim=True), layer.weight.amax(1, keepdim=True)
            scale, _ = calculate_qparams(low, high, layer.quantization_scheme.weights)
            layer.weight_scale.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)
