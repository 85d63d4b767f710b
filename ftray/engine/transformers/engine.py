"""The embedded engine: transformers' continuous batching, on CPU with sdpa or on GPU.

Knows nothing of HTTP, Ray, run files or training. Prompts are token ids. It adds the following to `ContinuousBatchingManager`:
sampling per request, text that never ends in half a character or stop string, memory that is bounded before the start, and
errors instead of endless waiting if its thread dies.

With `adapters=True` it holds LoRA adapters over the base. Requests for the base and for different adapters share batches: each
token is adapted by its request's adapter (`mixed_lora`). Prompts then share no cached prefixes, because keys and values depend
on the adapter.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import RequestStatus

from ftray.chat import ChatFormat, template_of, try_template
from ftray.compat.transformers import attention_of
from ftray.engine.detokenizer import Detokenizer, read_tokens, text_decoder
from ftray.engine.protocol import EngineError, OutputChunk, OutputStream, SamplingParams, StuckError, check_request
from ftray.engine.rope import steady_context
from ftray.engine.structured_output import SchemaCompiler
from ftray.engine.transformers.mixed_lora import MixedLora
from ftray.engine.transformers.sampling import RowSampler, RowSampling
from ftray.engine.transformers.self_check import LEAST, answer_alone, check_answers
from ftray.engine.transformers.softcap import PAGED, caps_scores, use_capped
from ftray.errors import DataError, ModelError

MAX_CONTEXT = 8192  # where the model itself allows more: the cache is allocated whole at the start
_PLANNED_CONTEXT = 1024  # tokens that the cache holds for each concurrent request; longer ones share, or wait
_PAGE_SIZE = 64
_MAX_BATCH_TOKENS = 512  # a longer prompt is prefilled in pieces; the mask is this × cache size
_WATCH_S = 1.0  # how often a waiting request checks the engine's thread

# Its warnings quote token ids of prompts; its errors reach us as exceptions.
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)


class TransformersEngine:
    """An `Engine` for one model in this process.

    From `start` to `stop` it holds keys and values of `num_cache_tokens()` tokens, and the model in eval mode with an
    attention that continuous batching supports.

    Args:
        model: A causal LM of transformers, or a PeftModel around one. Its active adapter answers; under PEFT's
            `disable_adapter()` the base does.
        tokenizer: A fast tokenizer.
        name: The base's name in `list_models`.
        max_num_seqs: Requests that run at the same time.
        max_context: Tokens of a prompt and its answer.
        stop_token_ids: Tokens that end an answer. Default: see `find_stop_tokens`.
        adapters: Whether LoRA adapters can be loaded.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "model",
        max_num_seqs: int = 8,
        max_context: int | None = None,
        stop_token_ids: tuple[int, ...] | None = None,
        adapters: bool = False,
    ) -> None:
        # continuous batching is a mixin of the transformers model, which contains PEFT's LoRA layers
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.tokenizer = tokenizer
        self.name = name
        self.max_num_seqs = max_num_seqs
        self.max_context = min(max_context or MAX_CONTEXT, _max_positions(self._model))
        self.stop_token_ids = find_stop_tokens(self._model, tokenizer) if stop_token_ids is None else stop_token_ids
        self._vocab_size = int(self._model.get_input_embeddings().weight.shape[0])
        self._schemas = SchemaCompiler(tokenizer, self._vocab_size, self.stop_token_ids)
        self._lora = MixedLora(self._model) if adapters else None
        self._hooks: list[Any] = []
        self._manager: Any = None
        self._attention: str | None = None  # the model's own, restored by `stop`
        self._ids = itertools.count()  # continuous batching crashes on a repeated request id, so it gets our own
        self._inboxes: dict[str, tuple[str, asyncio.Queue[Any]]] = {}

    async def start(self) -> None:
        """Allocates the cache, starts the thread and checks an answer.

        Raises:
            EngineError: There is too little memory.
            ModelError: The model gives wrong answers in a batch.
        """
        if self._manager is not None:
            raise EngineError("the engine has already been started")
        alone = (
            await asyncio.to_thread(answer_alone, self._model, self.max_context) if self.max_context >= LEAST else None
        )
        self._use_fitting_attention()
        sampler = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([RowSampler()]))
        sampler.tensors_required = 1  # it counts only processors that it has converted itself
        try:
            manager = self._model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=list(self.stop_token_ids) or -1),
                continuous_batching_config=self._batching_config(),
            )
            manager.logit_processor = sampler
            await asyncio.to_thread(manager.warmup)  # allocates the cache; without CUDA graphs it computes nothing
        except (MemoryError, ValueError, RuntimeError) as err:
            self._put_attention_back()
            raise EngineError(f"the engine could not start: {err}") from err
        if self._lora is not None:
            self._lora.attach()
            route = partial(self._route, manager.batch_processor)
            self._hooks = [self._model.register_forward_pre_hook(lambda *_: route())]
        manager.start()
        self._manager = manager
        try:
            if alone is not None:
                await check_answers(self, alone, self._model)
        except BaseException:
            await self.stop()
            raise

    def num_cache_tokens(self) -> int:
        """Tokens whose keys and values fit in the cache: one whole context, and a typical one per request."""
        return max(self.max_context, self.max_num_seqs * min(self.max_context, _PLANNED_CONTEXT))

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> OutputStream:
        """See Engine.generate."""
        self.health()
        loaded = None if adapter is None else self._need_lora(adapter).find(adapter)
        if request_id in self._inboxes:
            raise DataError(f"request {request_id} is already running; use another id")
        check_request(prompt_ids, params, self._vocab_size, self.max_context)
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(62))
        sampling = RowSampling(params, loaded, self._schemas.guide_for(params), num_prompt_tokens=len(prompt_ids))
        return self._generate(request_id, prompt_ids, sampling)

    def check_schema(self, schema: str) -> None:
        """See Engine.check_schema."""
        self._schemas.guide(schema)

    def check_grammar(self, grammar: str) -> None:
        """See Engine.check_grammar."""
        self._schemas.guide(grammar, is_grammar=True)

    async def _generate(
        self, request_id: str, prompt_ids: list[int], sampling: RowSampling
    ) -> AsyncGenerator[OutputChunk, None]:
        internal_id, inbox = f"{next(self._ids)}", asyncio.Queue[Any]()
        self._inboxes[request_id] = (internal_id, inbox)
        finished = False
        try:
            self._submit(internal_id, inbox, prompt_ids, sampling)
            decode = text_decoder(self.tokenizer, sampling.params.visible_ids)
            stream, num_seen = Detokenizer(decode, sampling.params.stop), 0
            while not finished:
                output = await self._receive(inbox)
                if sampling.guide is not None and sampling.guide.error:
                    raise StuckError(f"the answer cannot follow its schema any further: {sampling.guide.error}")
                new = output.generated_tokens[num_seen:]
                num_seen += len(new)
                finished = output.is_finished()
                text, taken, reason = read_tokens(stream, new, self.stop_token_ids, is_last=finished)
                num_generated = num_seen - len(new) + taken
                logprobs = tuple(sampling.logprobs[num_generated - taken : num_generated])
                yield OutputChunk(text, new[:taken], reason, len(prompt_ids), num_generated, logprobs)
                if reason:
                    break
        finally:
            self._inboxes.pop(request_id, None)
            self._release(internal_id, cancel=not finished)

    async def abort(self, request_id: str) -> None:
        """Ends a request: its iterator raises EngineError. Unknown ids are ignored, because the request may just have ended."""
        if request_id in self._inboxes:
            internal_id, inbox = self._inboxes[request_id]
            inbox.put_nowait(EngineError(f"request {request_id} was aborted"))
            self._release(internal_id, cancel=True)

    async def load_adapter(self, name: str, directory: str) -> None:
        """Loads a directory in PEFT's format under a name, while requests run.

        Raises:
            ModelError: It does not fit the base.
        """
        await asyncio.to_thread(self._need_lora(name).load, name, Path(directory))

    async def unload_adapter(self, name: str) -> None:
        """Removes an adapter. Requests that already run with it finish normally."""
        self._need_lora(name).unload(name)

    def list_models(self) -> list[str]:
        """The base, then the loaded adapters."""
        return [self.name, *(self._lora.names() if self._lora is not None else [])]

    def _need_lora(self, name: str) -> MixedLora:
        if self._lora is None:
            raise ModelError(f"this engine serves one model, without adapters; merge {name} with `ftray export`")
        return self._lora

    def _route(self, processor: Any) -> None:
        """Tells the adapters which tokens of the next batch belong to them. Runs in the engine's thread before each forward."""
        batch = processor.inputs_and_outputs.requests_in_batch
        requests = [(request.state.logit_processor_kwargs["sampling"], request.query_length) for request in batch]
        assert self._lora is not None
        self._lora.route([(each.adapter, length) for each, length in requests], self._model.device)

    def health(self) -> None:
        """Raises EngineError unless the thread runs."""
        if self._manager is None:
            raise EngineError("the engine is not running; start it first")
        status = self._manager.background_thread_status
        # A failing thread first stops accepting requests, then fails those it has, then records the error, and ends.
        if status.can_accept_new_requests() or not self._manager.is_running():
            raise EngineError(f"the engine's thread died: {status.fatal_error or 'it left no error'}")

    async def stop(self) -> None:
        """Ends the thread, fails running requests with EngineError and frees the cache. May be called twice."""
        manager, self._manager = self._manager, None
        if manager is None:
            return
        await asyncio.to_thread(manager.stop, block=True, hard_stop=True)  # frees the cache, too
        manager.destroy()
        if self._lora is not None:
            self._lora.detach()
        while self._hooks:
            self._hooks.pop().remove()
        self._put_attention_back()

    def _submit(
        self, internal_id: str, inbox: asyncio.Queue[Any], prompt_ids: list[int], sampling: RowSampling
    ) -> None:
        strays = self._manager.output_router.output_queue
        while not strays.empty():  # last outputs of cancelled requests, which nobody reads
            strays.get_nowait()
        self._manager.register_result_handler(internal_id, inbox.put_nowait)
        accepted = self._manager.add_request(
            prompt_ids,
            request_id=internal_id,
            max_new_tokens=sampling.params.max_tokens,
            eos_token_id=list(self.stop_token_ids) or -1,
            streaming=True,
            sampling=sampling,
        )
        if accepted is None:
            self.health()
            raise EngineError("the engine no longer accepts requests")

    async def _receive(self, inbox: asyncio.Queue[Any]) -> Any:
        """The newest output (outputs are cumulative). The thread can die silently, so this checks it while waiting."""
        while inbox.empty():
            try:
                async with asyncio.timeout(_WATCH_S):
                    output = await inbox.get()
                    break
            except TimeoutError:
                await asyncio.sleep(0)  # deliver the thread's last output before declaring it dead
                if inbox.empty():
                    self.health()
        else:
            output = inbox.get_nowait()
        while True:
            if isinstance(output, EngineError):
                raise output
            if output.status == RequestStatus.FAILED:
                raise EngineError(f"the engine failed: {output.error}")
            if inbox.empty():
                return output
            output = inbox.get_nowait()

    def _release(self, internal_id: str, *, cancel: bool) -> None:
        if self._manager is not None:
            if cancel:
                self._manager.cancel_request(internal_id)
            self._manager.output_router.result_handlers.pop(internal_id, None)

    def _batching_config(self) -> Any:
        # Set everything that would otherwise be derived from 90% of the machine's free memory.
        return ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            # one more page per request: a page belongs to one request, and the last page is rarely full
            num_blocks=math.ceil(self.num_cache_tokens() / _PAGE_SIZE) + self.max_num_seqs,
            max_batch_tokens=max(_MAX_BATCH_TOKENS, self.max_num_seqs),
            max_requests_per_batch=self.max_num_seqs,
            max_blocks_per_request=0,
            allow_block_sharing=self._lora is None,  # a prompt's keys and values depend on the adapter
            use_cuda_graph=False,  # RowSampler runs Python for each batch
            use_async_batching=False,
            auto_switch_to_flash=False,  # would search the hub for kernels
            seed=0,
        )

    def _use_fitting_attention(self) -> None:
        name = attention_of(self._model.config)
        if caps_scores(self._model.config):
            use_capped()
            self._attention = name
            self._model.set_attn_implementation(PAGED)
        elif name not in ("sdpa", "eager", "paged|eager") and not name.startswith("flash_attention"):
            self._attention = name  # e.g. one that training registered for packed sequences
            self._model.set_attn_implementation("sdpa")

    def _put_attention_back(self) -> None:
        if self._attention is not None:
            self._model.set_attn_implementation(self._attention)
            self._attention = None


def find_stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: those of the chat template, the tokenizer and the model's generation config."""
    return stop_tokens(tokenizer, getattr(model.generation_config, "eos_token_id", None))


def stop_tokens(tokenizer: Any, own: int | list[int] | None) -> tuple[int, ...]:
    """`find_stop_tokens`, given the eos_token_id of the generation config."""
    ids: list[int] = []
    if getattr(tokenizer, "chat_template", None):
        try_template(template_of(tokenizer))
        ids += ChatFormat(tokenizer).stop_token_ids
    for eos in (tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])):
        if eos is not None and eos >= 0:
            ids.append(int(eos))
    return tuple(dict.fromkeys(ids))


def _max_positions(model: Any) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    steady = steady_context(model.config)
    return min(int(positions) if positions else MAX_CONTEXT, steady or MAX_CONTEXT)
