"""Loads base model and tokenizer from a hub, a directory or the embedded package.

Only safetensors are read. Code that comes with a model runs only if the run file allows it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray import config, storage
from ftray.chat import ChatFormat, Conversation, Message, template_of, try_template
from ftray.compat.transformers import attention_in_file
from ftray.errors import DataError, ModelError
from ftray.model import embedded
from ftray.model.families import family_of
from ftray.storage.model_directory import check_config, check_hub_model, check_model_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def resolve_base(model: config.ModelConfig) -> str:
    """Local directory or hub id of `model.base`. Raises ModelError for a directory that holds no model."""
    base = model.base
    if base.startswith("embedded:"):
        return embedded.resolve(base, storage.cache_directory())
    looks_local = base.startswith((".", "/", "~")) or Path(base).expanduser().is_dir()
    if not looks_local:
        return base
    directory = Path(base).expanduser()
    if not directory.is_dir():
        raise ModelError(f"model.base {base} is not a directory; correct the path, or use a hub id like org/name")
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"model.base {base} holds an adapter, which is not a base model; use the merged model (model/merged)"
        )
    for needed, pattern in (
        ("config", "config.json"),
        ("weights", "*.safetensors"),
        ("tokenizer", "tokenizer*"),
    ):
        if not any(directory.glob(pattern)):
            raise ModelError(
                f"model.base {base} is not a model directory: it has no {needed} ({pattern}); use one written by save_pretrained"
            )
    try:
        check_model_files(directory)
    except ModelError as err:
        raise ModelError(f"model.base {base}: {err}") from None
    return str(directory.resolve())


def checked_revision(model: config.ModelConfig, base: str) -> str | None:
    """The revision to load; for a hub model the commit whose small files were checked. Raises ModelError."""
    if Path(base).is_absolute():
        return model.revision
    try:
        return check_hub_model(base, model.revision)
    except (OSError, ValueError) as err:
        raise ModelError(_explain(model, "config", err)) from None


def absolute_base(model: config.ModelConfig) -> config.ModelConfig:
    """The base with an absolute path, for processes with another working directory. Raises as `resolve_base`."""
    if model.base.startswith("embedded:"):
        return model  # each machine has its own cache
    return model.model_copy(update={"base": resolve_base(model)})


def load_tokenizer(model: config.ModelConfig) -> Any:
    """The base's tokenizer. Raises ModelError if it cannot be loaded or is not a fast one."""
    from transformers import AutoTokenizer

    base = resolve_base(model)
    revision = checked_revision(model, base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=model.trust_remote_code)
    except Exception as err:  # noqa: BLE001 - a damaged tokenizer.json raises anything
        raise ModelError(_explain(model, "tokenizer", err)) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.base {model.base} has no fast tokenizer (tokenizer.json); convert it, or use another base"
        )
    if getattr(tokenizer, "chat_template", None):
        _try_template(model, tokenizer)
    return tokenizer


def _try_template(model: config.ModelConfig, tokenizer: Any) -> None:
    try:
        try_template(template_of(tokenizer))
    except ModelError as err:
        raise ModelError(f"model.base {model.base}: {err}") from None


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of a tokenizer with its chat template: twelve hex digits."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def template_hash(tokenizer: Any) -> str:
    """Identity of a chat template alone: twelve hex digits."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]


def load_base(model: config.ModelConfig, dtype: torch.dtype, quantize: bool = False) -> PreTrainedModel:
    """The base as a causal language model in `dtype` on the CPU, or in 4 bits (nf4, double quantization).

    Raises ModelError if it cannot be loaded or is not a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if quantize:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = resolve_base(model)
    revision = checked_revision(model, base)
    try:
        settings = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=model.trust_remote_code)
        _apply_kernels(settings.model_type)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            base,
            revision=revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=family_of(settings).attention(settings),
            quantization_config=quantization,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(_explain(model, "model", err)) from None
    if missing := sorted(info["missing_keys"]):  # transformers would replace them by random weights
        raise ModelError(
            f"model.base {model.base} lacks {len(missing)} weights, the first is {missing[0]}; use a complete model"
        )
    _check_finite(loaded, base)
    whole: PreTrainedModel = loaded
    whole.config.use_cache = False
    return whole


def unquantized(base: PreTrainedModel) -> PreTrainedModel:
    """The model with its 4-bit layers dequantized, so that adapters can be merged."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in list(base.named_modules()):
        if isinstance(module, Linear4bit):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight, plain.bias = torch.nn.Parameter(values, requires_grad=False), module.bias
            base.set_submodule(name, plain)
    base.is_loaded_in_4bit = base.is_quantized = False
    del base.hf_quantizer, base.quantization_method, base.config.quantization_config
    return base


def outline_base(model: config.ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `load_base` without values, on torch's meta device. Reads no weights.

    Raises ModelError if its config cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = model.trust_remote_code
    base = resolve_base(model)
    revision = checked_revision(model, base)
    try:
        settings = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust)
        _apply_kernels(settings.model_type)
        with torch.device("meta"):
            outline: PreTrainedModel = AutoModelForCausalLM.from_config(
                settings,
                dtype=dtype,
                attn_implementation=family_of(settings).attention(settings),
                trust_remote_code=trust,
            )
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(_explain(model, "config", err)) from None
    outline.config.use_cache = False
    return outline


def check_base(model: config.ModelConfig) -> None:
    """Checks, before any worker starts, that the base is a causal language model for chats. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = resolve_base(model)
    revision = checked_revision(model, base)
    try:
        settings = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=model.trust_remote_code)
    except Exception as err:  # noqa: BLE001 - invalid values raise anything
        raise ModelError(_explain(model, "config", err)) from None
    own = {"_attn_implementation": attention_in_file(settings)}
    check_config(settings.to_dict() | own, Path(base) / "config.json")
    if settings.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not model.trust_remote_code:
        raise ModelError(
            f"model.base {model.base} has type {settings.model_type}, which is not a causal language model; use one"
        )
    kinds = settings.architectures or []
    if kinds and not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise ModelError(f"model.base {model.base} is a {kinds[0]}, not a causal language model; use one")
    if Path(base).is_dir():
        _check_weights(model, Path(base))
    tokenizer = load_tokenizer(model)
    try:
        chat = ChatFormat(tokenizer)
        _check_vocabulary(model, chat, tokenizer, settings.get_text_config().vocab_size)
    except (ModelError, DataError) as err:
        text = str(err)
        raise ModelError(text if "model.base" in text else f"model.base {model.base}: {text}") from None


def _check_vocabulary(model: config.ModelConfig, chat: ChatFormat, tokenizer: Any, num_embeddings: int) -> None:
    """Ids beyond the embeddings would fail inside a kernel. Special tokens count only if chats contain them."""
    if not any(chat.can_write(character) for character in "aA0"):
        raise ModelError(
            f"model.base {model.base}: its tokenizer has no tokens for letters and digits, which would be lost; use another base"
        )
    written = {*chat.encode_prompt(Conversation((Message("user", "Hello"),))), *chat.stop_token_ids}
    unused = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - written
    token_id, token = max((i, token) for token, i in tokenizer.get_vocab().items() if i not in unused)
    if token_id >= num_embeddings:
        raise ModelError(
            f"model.base {model.base}: its tokenizer has the id {token_id} ({token!r}), its embeddings end at "
            f"{num_embeddings - 1}; use the tokenizer of these weights, or resize the embeddings"
        )


def _check_weights(model: config.ModelConfig, directory: Path) -> None:
    """Reads the headers, so that truncated or invalid files are reported early."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as err:
            raise ModelError(
                f"model.base {model.base}: {path.name} is damaged ({err}); copy or download it again"
            ) from None
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"model.base {model.base}: {index.name} is damaged; copy or download it again") from None
    if missing := sorted(name for name in names if not (directory / name).exists()):
        raise ModelError(
            f"model.base {model.base} lacks {missing[0]} ({len(missing)} of {len(names)} weight files); "
            "copy or download them again"
        )


def _explain(model: config.ModelConfig, what: str, err: Exception) -> str:
    first = " ".join(str(err).split()).split(". ")[0][:240]
    if Path(model.base).expanduser().is_dir():
        return f"model.base {model.base}: its {what} cannot be loaded ({first}); copy or download it again"
    return (
        f"model.base {model.base} is not a local directory, and its {what} cannot be loaded from the hub ({first}); "
        "check the name, the revision and access to the hub"
    )


def _apply_kernels(model_type: str) -> bool:
    """Replaces RMSNorm, RoPE and SwiGLU of a model type by Liger's fused kernels, if installed, on GPUs. Whole process.

    Equal to eager within bf16 rounding (tests/gpu). The loss is ftray's own, so Liger's is left out.

    Returns:
        Whether there are kernels for the model type.
    """
    import torch

    if not torch.cuda.is_available() or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import monkey_patch

    apply: Any = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if apply is None:
        return False
    apply(cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def _check_finite(model: Any, base: str) -> None:
    """Checks every weight of a model once, while it is in host memory.

    Args:
        model: A model with its values; for quantized layers the scales of their blocks are checked.
        base: `model.base`, for the message.

    Raises:
        ModelError: A weight is infinite or NaN; it names the file and the tensor.
    """
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if not all(map(_is_finite, _checked_values(parameter))):
            file, tensor = _find_in_files(Path(base).expanduser(), name) or ("its weights", name)
            raise ModelError(
                f"model.base {base}: {file} has an infinite or NaN value in {tensor}; download or write the weights again"
            )


def _checked_values(parameter: Any) -> Iterator[Any]:
    yield parameter
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in (state.absmax, getattr(state, "offset", None)) if value is not None)
        state = getattr(state, "state2", None)


def _is_finite(values: Any) -> bool:
    """One pass without a copy: NaN and infinity appear in minimum and maximum."""
    import torch

    if values.is_meta or not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() < 2:  # torch has no minimum and maximum of 8-bit floats
        values = values.float()
    return bool(torch.stack(torch.aminmax(values.detach())).isfinite().all())


def _find_in_files(directory: Path, name: str) -> tuple[str, str] | None:
    """(file, tensor) of the first value that is not finite; the tensor `name` is checked first."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                keys = sorted(file.keys(), key=lambda key: key != name)
                if bad := next((key for key in keys if not _is_finite(file.get_tensor(key))), None):
                    return path.name, bad
        except (SafetensorError, OSError):
            continue
    return None
