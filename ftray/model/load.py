"""Base model and tokenizer, from a hub, a directory or the embedded package. Knows nothing of data or training.

Only safetensors are read, and no code that comes with a model runs unless the run file says so.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray import config, storage
from ftray.chat import ChatFormat, Message, template_of, try_template
from ftray.compat.transformers import attention_in_file
from ftray.errors import DataError, ModelError
from ftray.model import embedded
from ftray.model.families import family_of
from ftray.model.weights_check import check_finite
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
        raise ModelError(f"model.base {base} is not a directory; correct the path, or give a hub id like org/name")
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"model.base {base} holds an adapter, which is no base; give the model it was merged into (model/merged)"
        )
    for needed, pattern in (
        ("config", "config.json"),
        ("weights", "*.safetensors"),
        ("tokenizer", "tokenizer*"),
    ):
        if not any(directory.glob(pattern)):
            raise ModelError(
                f"model.base {base} is no model directory: it has no {needed} ({pattern}); give one saved by save_pretrained"
            )
    try:
        check_model_files(directory)
    except ModelError as err:
        raise ModelError(f"model.base {base}: {err}") from None
    return str(directory.resolve())


def checked_revision(model: config.ModelConfig, base: str) -> str | None:
    """The revision to load: of a hub's model the commit whose small files were checked. Raises ModelError."""
    if Path(base).is_absolute():
        return model.revision
    try:
        return check_hub_model(base, model.revision)
    except (OSError, ValueError) as err:
        raise ModelError(_explain(model, "config", err)) from None


def absolute_base(model: config.ModelConfig) -> config.ModelConfig:
    """The same base for processes with another working directory, as Ray's workers have. Raises as `resolve_base`."""
    if model.base.startswith("embedded:"):
        return model  # each machine has its own cache
    return model.model_copy(update={"base": resolve_base(model)})


def load_tokenizer(model: config.ModelConfig) -> Any:
    """The base's tokenizer. Raises ModelError when it can't be had or is not a fast one."""
    from transformers import AutoTokenizer

    base = resolve_base(model)
    revision = checked_revision(model, base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=model.trust_remote_code)
    except Exception as err:  # noqa: BLE001 - a damaged tokenizer.json raises what Rust and Python have
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

    Raises ModelError when it can't be had or isn't a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from ftray.model.kernels import apply_kernels

    quantization = None
    if quantize:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = resolve_base(model)
    revision = checked_revision(model, base)
    try:
        found = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=model.trust_remote_code)
        apply_kernels(found.model_type)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            base,
            revision=revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=family_of(found).attention(found),
            quantization_config=quantization,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(_explain(model, "model", err)) from None
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random weights in their place
        raise ModelError(
            f"model.base {model.base} lacks {len(missing)} weights, the first is {missing[0]}; use a whole causal language model"
        )
    check_finite(loaded, base)
    whole: PreTrainedModel = loaded
    whole.config.use_cache = False
    return whole


def unquantized(base: PreTrainedModel) -> PreTrainedModel:
    """The same model with its layers in 4 bits as plain ones, of the values that these stand for: adapters can be merged."""
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
    """The same model as `load_base` gives, without values: on torch's meta device. Reads no weights.

    Raises ModelError when its config can't be had.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model.kernels import apply_kernels

    trust = model.trust_remote_code
    base = resolve_base(model)
    revision = checked_revision(model, base)
    try:
        found = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust)
        apply_kernels(found.model_type)
        with torch.device("meta"):
            outline: PreTrainedModel = AutoModelForCausalLM.from_config(
                found, dtype=dtype, attn_implementation=family_of(found).attention(found), trust_remote_code=trust
            )
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(_explain(model, "config", err)) from None
    outline.config.use_cache = False
    return outline


def check_base(model: config.ModelConfig) -> None:
    """Fails early, before any worker starts, if the base isn't a causal language model for chats. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = resolve_base(model)
    revision = checked_revision(model, base)
    try:
        found = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=model.trust_remote_code)
    except Exception as err:  # noqa: BLE001 - a config's class raises what its values lead to
        raise ModelError(_explain(model, "config", err)) from None
    own = {"_attn_implementation": attention_in_file(found)}
    check_config(found.to_dict() | own, Path(base) / "config.json")
    if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not model.trust_remote_code:
        raise ModelError(f"model.base {model.base} is of type {found.model_type}, no causal language model; use one")
    kinds = found.architectures or []
    if kinds and not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise ModelError(f"model.base {model.base} is a {kinds[0]}, no causal language model; use one")
    if Path(base).is_dir():
        _check_weights(model, Path(base))
    tokenizer = load_tokenizer(model)
    try:
        chat = ChatFormat(tokenizer)
        _check_vocabulary(model, chat, tokenizer, found.get_text_config().vocab_size)
    except (ModelError, DataError) as err:
        text = str(err)
        raise ModelError(text if "model.base" in text else f"model.base {model.base}: {text}") from None


def _check_vocabulary(model: config.ModelConfig, chat: ChatFormat, tokenizer: Any, num_embeddings: int) -> None:
    """Ids beyond the embeddings would be an error inside a kernel. Special tokens count only where chats have them."""
    if not any(chat.can_write(character) for character in "aA0"):
        raise ModelError(
            f"model.base {model.base}: its tokenizer has no token for letters and digits, so that text would be lost; use another"
        )
    written = {*chat.encode_prompt([Message("user", "Hello")]), *chat.stop_token_ids}
    unused = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - written
    token_id, token = max((i, token) for token, i in tokenizer.get_vocab().items() if i not in unused)
    if token_id >= num_embeddings:
        raise ModelError(
            f"model.base {model.base}: its tokenizer has the id {token_id} ({token!r}), its embeddings end at "
            f"{num_embeddings - 1}; give the tokenizer that belongs to these weights, or resize the embeddings"
        )


def _check_weights(model: config.ModelConfig, directory: Path) -> None:
    """Reads the headers: a file that is cut off, or of another kind, is told before hours are spent on its way."""
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
        return f"model.base {model.base}: its {what} can't be loaded ({first}); copy or download it again"
    return (
        f"model.base {model.base} is no directory here, and its {what} can't be loaded from the hub ({first}); "
        "check the name, the revision and access to the hub"
    )
