"""The vLLM engine: vLLM's AsyncLLM inside a replica, with the same protocol as the transformers engine.

Knows no HTTP, Ray, run files or templates. vLLM computes and schedules. Text, stop strings and the checks of prompts and
adapters are shared with the transformers engine, so that both answer alike. vLLM's own server, with its routes, tokenization and
adapter names, is not used. Tensor parallelism, quantized weights (by the model's config.json) and the prefix cache are vLLM's.

Needs `pip install ftray[vllm]`; CPU builds of vLLM work, too.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ftray.engine.adapter_references import AdapterReference, AdapterReferences, ReferencedChunks
from ftray.engine.adapters import VLLM_MAX_RANK, WEIGHTS_FILE, check_adapter, layers_of, read_adapter_files
from ftray.engine.detokenizer import Detokenizer, read_tokens, text_decoder
from ftray.engine.protocol import EngineError, OutputChunk, OutputStream, SamplingParams, TokenLogprob, check_request
from ftray.engine.structured_output import SchemaCompiler
from ftray.engine.transformers.engine import MAX_CONTEXT, stop_tokens
from ftray.errors import DataError, ModelError
from ftray.storage.model_directory import check_model_directory

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a model on the hub


class VllmEngine:
    """An `Engine` for one model directory or hub model. Call `start` before use.

    Args:
        model_dir: The model directory, or a hub id.
        name: The model's name for clients.
        dtype: As in `load_engine`.
        max_num_seqs: Requests per batch.
        max_context: Maximum tokens of prompt and answer.
        max_adapters: LoRA adapters per batch; 0: none can be loaded.
        tensor_parallel: Number of GPUs.
        revision: The hub revision.

    Raises:
        ModelError: The directory is not a model, or vLLM is not installed.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        name: str = "model",
        dtype: str | None = None,
        max_num_seqs: int = 8,
        max_context: int | None = None,
        max_adapters: int = 0,
        tensor_parallel: int = 1,
        revision: str | None = None,
    ) -> None:
        self._directory = _local(model_dir, revision)  # checks the files before vLLM reads them
        _configure_vllm()
        self.name, self._dtype, self.max_num_seqs = name, dtype, max_num_seqs
        self._max_adapters, self._tensor_parallel = max_adapters, tensor_parallel
        try:
            config = AutoConfig.from_pretrained(self._directory, trust_remote_code=False).get_text_config()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self._directory, trust_remote_code=False)
            own = _generation_eos(self._directory)
        except (OSError, ValueError, KeyError) as err:
            reason = " ".join(str(err).split())[:300]
            raise ModelError(f"{model_dir} cannot be loaded: {reason}; write it again with `ftray export`") from err
        longest = getattr(config, "max_position_embeddings", None) or MAX_CONTEXT
        self.max_context = min(max_context or MAX_CONTEXT, int(longest))
        self.stop_token_ids = stop_tokens(self.tokenizer, own)
        self._vocab_size = int(config.vocab_size)
        self._is_quantized = getattr(config, "quantization_config", None) is not None
        self._schemas = SchemaCompiler(self.tokenizer, self._vocab_size, self.stop_token_ids)
        self._llm: Any = None
        self._ids = itertools.count(1)
        self._loaded: dict[str, Any] = {}  # name → LoRARequest
        self._holds = AdapterReferences(self._free)
        self._running: dict[str, str] = {}  # request id → vLLM's

    async def start(self) -> None:
        """Loads weights and allocates the cache, in vLLM's own processes. Raises EngineError if that fails."""
        if self._llm is not None:
            raise EngineError("the engine is already started")
        from vllm import AsyncEngineArgs
        from vllm.config import StructuredOutputsConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        on_gpu = torch.cuda.is_available()
        lora: dict[str, Any] = {}
        if self._max_adapters:
            # Also keep the adapters of running requests: their files may have been deleted.
            most = self._max_adapters + self.max_num_seqs
            lora = {
                "enable_lora": True,
                "max_loras": self._max_adapters,
                "max_cpu_loras": most,
                "max_lora_rank": VLLM_MAX_RANK,
            }
            if not on_gpu:
                lora["worker_extension_cls"] = "ftray.compat.vllm.CpuLoraFix"
        args = AsyncEngineArgs(
            model=str(self._directory),
            dtype=self._dtype or "auto",
            max_model_len=self.max_context,
            max_num_seqs=self.max_num_seqs,
            tensor_parallel_size=self._tensor_parallel,
            enforce_eager=not on_gpu,
            enable_prefix_caching=True,
            generation_config="vllm",  # do not apply the model's own sampling defaults
            trust_remote_code=False,
            disable_log_stats=True,
            structured_outputs_config=StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True),
            **lora,
        )
        try:
            self._llm = await asyncio.to_thread(self._build, AsyncLLM, args)
        except Exception as err:
            raise EngineError(f"vLLM could not start: {' '.join(str(err).split())[:300]}") from err

    @staticmethod
    def _build(kind: Any, args: Any) -> Any:
        return kind.from_engine_args(args)

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> OutputStream:
        """See Engine.generate."""
        self.health()
        if adapter is not None and adapter not in self._loaded:
            raise ModelError(f"the adapter {adapter} is not loaded")
        if request_id in self._running:
            raise DataError(f"request {request_id} is already running")
        check_request(prompt_ids, params, self._vocab_size, self.max_context)
        self._schemas.guide_for(params)  # vLLM would report a schema that it cannot use only later
        vllm_params, lora = _params(params, self.stop_token_ids), self._loaded.get(adapter or "")
        if lora is None:
            return self._generate(request_id, prompt_ids, params, vllm_params)
        hold = self._holds.take(
            lora.lora_int_id
        )  # now: the adapter may be unloaded before the first token is requested
        return ReferencedChunks(self._generate(request_id, prompt_ids, params, vllm_params, lora, hold), hold)

    async def _generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        vllm_params: Any,
        lora: Any = None,
        hold: AdapterReference | None = None,
    ) -> AsyncGenerator[OutputChunk, None]:
        internal = self._running[request_id] = f"r{next(self._ids)}"
        stream, num_generated = Detokenizer(text_decoder(self.tokenizer, params.visible_ids), params.stop), 0
        try:
            prompt = {"prompt_token_ids": prompt_ids}
            outputs = self._llm.generate(prompt, vllm_params, internal, lora_request=lora)
            async with aclosing(outputs):  # leaving it aborts the request
                async for output in outputs:
                    (one,) = output.outputs
                    if one.finish_reason not in (None, "stop", "length"):
                        raise EngineError(f"request {request_id} was ended by the engine: {one.finish_reason}")
                    new = list(one.token_ids)
                    text, taken, reason = read_tokens(
                        stream, new, self.stop_token_ids, is_last=one.finish_reason is not None
                    )
                    num_generated += taken
                    logprobs = _logprobs(new[:taken], one.logprobs, params.num_logprobs)
                    yield OutputChunk(text, new[:taken], reason, len(prompt_ids), num_generated, logprobs)
                    if reason:
                        break
        except (EngineError, GeneratorExit, asyncio.CancelledError):
            raise
        except Exception as err:
            raise EngineError(f"vLLM failed: {type(err).__name__}") from err  # its message may contain a client's text
        finally:
            self._running.pop(request_id, None)
            if hold is not None:
                await hold.end()

    def check_schema(self, schema: str) -> None:
        """See Engine.check_schema."""
        self._schemas.guide(schema)

    def check_grammar(self, grammar: str) -> None:
        """See Engine.check_grammar."""
        self._schemas.guide(grammar, is_grammar=True)

    async def abort(self, request_id: str) -> None:
        """Aborts a request; its iterator raises EngineError. Unknown ids are ignored."""
        if (internal := self._running.get(request_id)) is not None:
            await self._llm.abort(internal)

    async def load_adapter(self, name: str, directory: str) -> None:
        """Loads an adapter directory in PEFT's format while requests run. Raises ModelError if it does not fit the model."""
        if not self._max_adapters:
            raise ModelError(f"this engine serves one model, without adapters; merge {name} with `ftray export`")
        from vllm.lora.request import LoRARequest

        await asyncio.to_thread(self._check_adapter, Path(directory))
        request = LoRARequest(lora_name=name, lora_int_id=next(self._ids), lora_path=directory)
        try:
            await self._llm.add_lora(request)
        except Exception as err:
            self.health()
            raise ModelError(f"{directory} cannot be loaded: {' '.join(str(err).split())[:300]}") from err
        await self.unload_adapter(name)
        self._loaded[name] = request

    async def unload_adapter(self, name: str) -> None:
        """Unloads an adapter for new requests. Running requests keep it until they finish."""
        request = self._loaded.pop(name, None)
        if request is not None:
            await self._holds.retire(request.lora_int_id)

    async def _free(self, lora_id: int) -> None:
        if self._llm is not None and not self._llm.errored:
            await self._llm.remove_lora(lora_id)

    def list_models(self) -> list[str]:
        """The base, then the loaded adapters."""
        return [self.name, *self._loaded]

    def health(self) -> None:
        """Raises EngineError unless vLLM's processes are alive."""
        if self._llm is None:
            raise EngineError("the engine is not running; start it first")
        if self._llm.errored:
            raise EngineError("vLLM's engine died; see its log")

    async def stop(self) -> None:
        """Stops vLLM's processes; running requests raise EngineError. May be called twice."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        await llm.abort(list(self._running.values()))
        await asyncio.to_thread(llm.shutdown)

    def _check_adapter(self, directory: Path) -> None:
        """Checks an adapter like the transformers engine, and for features that vLLM does not support."""
        where = str(directory)
        try:
            settings, shapes = read_adapter_files(directory)
            with safe_open(directory / WEIGHTS_FILE, "pt") as file:
                if self._is_quantized:  # the base's weights are packed
                    layers_of(settings, shapes, where)
                else:
                    check_adapter(settings, shapes, self._base_shapes(), where)
                if not all(torch.isfinite(file.get_tensor(name)).all() for name in shapes):
                    raise ModelError(f"{where} has weights that are not finite; publish an earlier checkpoint")
        except (OSError, SafetensorError) as err:
            raise ModelError(f"{where} cannot be read as an adapter ({err}); publish it again") from None
        if settings.use_dora:
            raise ModelError(
                f"{where} uses DoRA, which vLLM does not support; set serve.engine: transformers, or merge it"
            )
        if settings.rank > VLLM_MAX_RANK:
            raise ModelError(
                f"{where} has rank {settings.rank}; serve.engine: vllm allows at most {VLLM_MAX_RANK}; use transformers"
            )

    def _base_shapes(self) -> dict[str, list[int]]:
        shapes: dict[str, list[int]] = {}
        for path in sorted(self._directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes


def _params(params: SamplingParams, stop_token_ids: tuple[int, ...]) -> Any:
    """Converts sampling parameters to vLLM's."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

    is_guided = params.json_schema is not None or params.grammar is not None
    return VllmSamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        seed=None if params.seed is None else params.seed % 2**63,
        logprobs=params.num_logprobs,
        stop_token_ids=list(stop_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        structured_outputs=StructuredOutputsParams(json=params.json_schema, grammar=params.grammar)
        if is_guided
        else None,
    )


def _logprobs(tokens: list[int], logprobs: Any, num_top: int | None) -> tuple[TokenLogprob, ...]:
    """logprobs: for each token, log probabilities by token id, before temperature and top_p."""
    if num_top is None or logprobs is None:
        return ()
    converted = []
    for token, by_id in zip(tokens, logprobs, strict=False):
        best = sorted(((other, float(one.logprob)) for other, one in by_id.items()), key=lambda pair: -pair[1])
        converted.append(TokenLogprob(token, float(by_id[token].logprob), tuple(best[:num_top])))
    return tuple(converted)


def _local(model_dir: str | Path, revision: str | None) -> Path:
    """The model directory; a hub model is downloaded."""
    if isinstance(model_dir, Path) or Path(model_dir).is_absolute() or Path(model_dir).is_dir():
        check_model_directory(Path(model_dir))
        return Path(model_dir)
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(model_dir, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as err:
        raise ModelError(
            f"{model_dir} could not be downloaded from the hub: {' '.join(str(err).split())[:200]}"
        ) from None
    check_model_directory(directory)
    return directory


def _generation_eos(directory: Path) -> Any:
    if not (directory / "generation_config.json").exists():
        return AutoConfig.from_pretrained(directory, trust_remote_code=False).eos_token_id
    return GenerationConfig.from_pretrained(directory).eos_token_id


def _configure_vllm() -> None:
    """Sets defaults for variables that vLLM reads at import. Existing values are kept."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",  # its INFO lines contain requests
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, without a GPU; the default is half of the machine's memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    try:
        import vllm  # noqa: F401
    except ImportError as err:
        raise ModelError(f"serve.engine: vllm needs vLLM ({err}); pip install ftray[vllm]") from None
