"""The engine for GPUs: vLLM's AsyncLLM inside our replica, behind the same protocol as the embedded one.

Knows nothing of HTTP, Ray, run files or templates. vLLM computes and schedules; text, stop strings and the checks of
prompts and adapters are the embedded engine's, so that both answer alike. vLLM's own server is not used: its routes, its
tokenization and its names for adapters stay out. Tensor parallelism, quantized weights (as the model's config.json tells)
and its prefix cache are vLLM's own.

Needs `pip install ftray[vllm]`; CPU builds of vLLM do, too.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ftray.engine.adapter_references import AdapterReference, AdapterReferences, ReferencedChunks
from ftray.engine.adapters import VLLM_MAX_RANK, WEIGHTS_FILE, check_adapter, layers_of, read_adapter_files
from ftray.engine.detokenizer import Detokenizer, read_tokens
from ftray.engine.protocol import EngineError, OutputChunk, SamplingParams, TokenLogprob, check_prompt
from ftray.engine.structured_output import SchemaCompiler
from ftray.engine.transformers.engine import MAX_CONTEXT, stop_tokens
from ftray.errors import DataError, ModelError
from ftray.storage.model_directory import check_model_directory

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub's model


class VllmEngine:
    """An `Engine` for one model directory (or a hub's model), to be started.

    max_adapters: LoRA adapters that share a batch; 0: none can be loaded. tensor_parallel: GPUs. dtype as `load_engine`.
    Raises ModelError when the directory is no model, or vLLM is not installed.
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
        _quieten()
        self.name, self._dtype, self.max_num_seqs = name, dtype, max_num_seqs
        self._max_adapters, self._tensor_parallel = max_adapters, tensor_parallel
        try:
            config = AutoConfig.from_pretrained(self._directory, trust_remote_code=False).get_text_config()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self._directory, trust_remote_code=False)
            own = _generation_eos(self._directory)
        except (OSError, ValueError, KeyError) as err:
            reason = " ".join(str(err).split())[:300]
            raise ModelError(f"{model_dir} can't be loaded: {reason}; write it again with `ftray export`") from err
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
        """Loads weights and makes the cache, in processes of vLLM's own. Raises EngineError when that fails."""
        if self._llm is not None:
            raise EngineError("the engine is started already")
        from vllm import AsyncEngineArgs
        from vllm.config import StructuredOutputsConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        on_gpu = torch.cuda.is_available()
        lora: dict[str, Any] = {}
        if self._max_adapters:
            # Beyond those in a batch it keeps what running requests need: their files may be gone meanwhile.
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
            generation_config="vllm",  # no sampling defaults of the model's own behind the client's back
            trust_remote_code=False,
            disable_log_stats=True,
            structured_outputs_config=StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True),
            **lora,
        )
        try:
            self._llm = await asyncio.to_thread(self._build, AsyncLLM, args)
        except Exception as err:
            raise EngineError(f"vLLM can't start: {' '.join(str(err).split())[:300]}") from err

    @staticmethod
    def _build(kind: Any, args: Any) -> Any:
        return kind.from_engine_args(args)

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> AsyncIterator[OutputChunk]:
        """See Engine.generate."""
        self.health()
        if adapter is not None and adapter not in self._loaded:
            raise ModelError(f"the adapter {adapter} is not loaded")
        if request_id in self._running:
            raise DataError(f"request {request_id} is being answered already")
        check_prompt(prompt_ids, params.max_tokens, self._vocab_size, self.max_context)
        if params.json_schema is not None:
            self.check_schema(params.json_schema)
        theirs, lora = _params(params, self.stop_token_ids), self._loaded.get(adapter or "")
        if lora is None:
            return self._generate(request_id, prompt_ids, params, theirs)
        hold = self._holds.take(lora.lora_int_id)  # at once: it may be unloaded before the first token is asked for
        return ReferencedChunks(self._generate(request_id, prompt_ids, params, theirs, lora, hold), hold)

    async def _generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        theirs: Any,
        lora: Any = None,
        hold: AdapterReference | None = None,
    ) -> AsyncGenerator[OutputChunk, None]:
        internal = self._running[request_id] = f"r{next(self._ids)}"
        stream, num_generated = Detokenizer(self._decode, params.stop), 0
        try:
            prompt = {"prompt_token_ids": prompt_ids}
            outputs = self._llm.generate(prompt, theirs, internal, lora_request=lora)
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
                    told = _logprobs(new[:taken], one.logprobs, params.num_logprobs)
                    yield OutputChunk(text, new[:taken], reason, len(prompt_ids), num_generated, told)
                    if reason:
                        break
        except (EngineError, GeneratorExit, asyncio.CancelledError):
            raise
        except Exception as err:
            raise EngineError(f"vLLM failed: {type(err).__name__}") from err  # its text may hold a client's
        finally:
            self._running.pop(request_id, None)
            if hold is not None:
                await hold.end()

    def check_schema(self, schema: str) -> None:
        """See Engine.check_schema."""
        self._schemas.guide(schema)

    async def abort(self, request_id: str) -> None:
        """Ends a request; whoever iterates gets EngineError. Unknown ids are ignored."""
        if (internal := self._running.get(request_id)) is not None:
            await self._llm.abort(internal)

    async def load_adapter(self, name: str, directory: str) -> None:
        """Loads a directory in PEFT's format under a name, beside what runs. Raises ModelError if it doesn't fit."""
        if not self._max_adapters:
            raise ModelError(f"this engine serves one model, without adapters; merge {name} with `ftray export`")
        from vllm.lora.request import LoRARequest

        await asyncio.to_thread(self._check_adapter, Path(directory))
        request = LoRARequest(lora_name=name, lora_int_id=next(self._ids), lora_path=directory)
        try:
            await self._llm.add_lora(request)
        except Exception as err:
            self.health()
            raise ModelError(f"{directory} can't be loaded: {' '.join(str(err).split())[:300]}") from err
        await self.unload_adapter(name)
        self._loaded[name] = request

    async def unload_adapter(self, name: str) -> None:
        """Takes an adapter away from new requests; those that run with it end as they would have."""
        request = self._loaded.pop(name, None)
        if request is not None:
            await self._holds.retire(request.lora_int_id)

    async def _free(self, lora_id: int) -> None:
        if self._llm is not None and not self._llm.errored:
            await self._llm.remove_lora(lora_id)

    def list_models(self) -> list[str]:
        """The base, then the adapters that are loaded."""
        return [self.name, *self._loaded]

    def health(self) -> None:
        """Raises EngineError unless vLLM's processes live."""
        if self._llm is None:
            raise EngineError("the engine is not running; start it first")
        if self._llm.errored:
            raise EngineError("vLLM's engine died; its log says why")

    async def stop(self) -> None:
        """Ends vLLM's processes; what runs gets EngineError. May be called twice."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        await llm.abort(list(self._running.values()))
        await asyncio.to_thread(llm.shutdown)

    def _check_adapter(self, directory: Path) -> None:
        """As the embedded engine does, and what vLLM in particular can't hold."""
        where = str(directory)
        try:
            settings, shapes = read_adapter_files(directory)
            with safe_open(directory / WEIGHTS_FILE, "pt") as file:
                if self._is_quantized:  # the base's weights are packed
                    layers_of(settings, shapes, where)
                else:
                    check_adapter(settings, shapes, self._base_shapes(), where)
                if not all(torch.isfinite(file.get_tensor(name)).all() for name in shapes):
                    raise ModelError(f"{where} holds weights that are not finite; publish an earlier checkpoint")
        except (OSError, SafetensorError) as err:
            raise ModelError(f"{where} can't be read as an adapter ({err}); publish it again") from None
        if settings.use_dora:
            raise ModelError(
                f"{where} uses DoRA, which vLLM doesn't serve; use serve.engine: transformers, or merge it"
            )
        if settings.rank > VLLM_MAX_RANK:
            raise ModelError(
                f"{where} has rank {settings.rank}; with serve.engine: vllm it is at most {VLLM_MAX_RANK}; use transformers"
            )

    def _base_shapes(self) -> dict[str, list[int]]:
        shapes: dict[str, list[int]] = {}
        for path in sorted(self._directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _params(params: SamplingParams, stop_token_ids: tuple[int, ...]) -> Any:
    """vLLM's words for ours."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    from vllm.sampling_params import SamplingParams as Theirs

    return Theirs(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        seed=None if params.seed is None else params.seed % 2**63,
        logprobs=params.num_logprobs,
        stop_token_ids=list(stop_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if params.json_schema is None else StructuredOutputsParams(json=params.json_schema),
    )


def _logprobs(tokens: list[int], told: Any, num_top: int | None) -> tuple[TokenLogprob, ...]:
    """told: for each token, its own and the likeliest tokens' log probabilities, before temperature and top_p."""
    if num_top is None or told is None:
        return ()
    found = []
    for token, by_id in zip(tokens, told, strict=False):
        best = sorted(((other, float(one.logprob)) for other, one in by_id.items()), key=lambda pair: -pair[1])
        found.append(TokenLogprob(token, float(by_id[token].logprob), tuple(best[:num_top])))
    return tuple(found)


def _local(model_dir: str | Path, revision: str | None) -> Path:
    """The directory itself; a hub's model is fetched."""
    if isinstance(model_dir, Path) or Path(model_dir).is_absolute() or Path(model_dir).is_dir():
        check_model_directory(Path(model_dir))
        return Path(model_dir)
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(model_dir, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as err:
        raise ModelError(f"{model_dir} can't be had from the hub: {' '.join(str(err).split())[:200]}") from None
    check_model_directory(directory)
    return directory


def _generation_eos(directory: Path) -> Any:
    if not (directory / "generation_config.json").exists():
        return AutoConfig.from_pretrained(directory, trust_remote_code=False).eos_token_id
    return GenerationConfig.from_pretrained(directory).eos_token_id


def _quieten() -> None:
    """vLLM reads these where it is imported. What is set already stays."""
    usual = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",  # its INFO lines tell requests
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, where there is no GPU; it would take half of the machine
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for key, value in usual.items():
        os.environ.setdefault(key, value)
    try:
        import vllm  # noqa: F401
    except ImportError as err:
        raise ModelError(f"serve.engine: vllm needs vLLM ({err}); pip install ftray[vllm]") from None
