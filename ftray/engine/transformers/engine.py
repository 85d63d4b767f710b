"""The embedded engine: transformers' continuous batching, on CPU with sdpa or on GPU.

Knows nothing of HTTP, Ray, run files or how a model was trained. Prompts come as ids, from whoever knows the chat
template. What it adds to `ContinuousBatchingManager`: sampling by request, text that never shows half a character or a
stop string, memory that is bounded before it starts, and errors instead of waiting when its thread dies.

With `adapters=True` it holds LoRA adapters over the base, and requests for the base and for different adapters share
batches: each token is adapted by its request's adapter (mixed_lora). transformers shares cached keys and values between
prompts that begin alike; here only those of the same adapter do.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import RequestStatus

from ftray.chat import ChatFormat, template_of, try_template
from ftray.compat.transformers import attention_of
from ftray.engine.detokenizer import Detokenizer, read_tokens
from ftray.engine.protocol import EngineError, OutputChunk, SamplingParams, StuckError, check_prompt
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
_WATCH_S = 1.0  # how often a waiting request looks whether the engine lives

# Its warnings quote token ids of prompts, and its errors reach us as exceptions anyway.
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)


class TransformersEngine:
    """An `Engine` for one model in this process.

    model: a causal LM of transformers, or a PeftModel around one (its active adapter answers; under PEFT's
    `disable_adapter()` the base does). tokenizer: fast. From `start` to `stop` it holds keys and values of
    `num_cache_tokens()` tokens, and the model in eval mode with an attention that continuous batching can use.
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
        # continuous batching is a mixin of the transformers model; LoRA layers stay where PEFT put them inside it
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
        self._attention: str | None = None  # to be put back
        self._ids = itertools.count()  # continuous batching dies of a request id that comes twice: it gets ours
        self._inboxes: dict[str, tuple[str, asyncio.Queue[Any]]] = {}

    async def start(self) -> None:
        """Allocates the cache, starts the thread and tries an answer.

        Raises EngineError when memory doesn't suffice, ModelError for a model that can't be answered for in batches.
        """
        if self._manager is not None:
            raise EngineError("the engine is started already")
        alone = (
            await asyncio.to_thread(answer_alone, self._model, self.max_context) if self.max_context >= LEAST else None
        )
        self._use_fitting_attention()
        sampler = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([RowSampler()]))
        sampler.tensors_required = 1  # it counts only processors that it converted itself
        try:
            manager = self._model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=list(self.stop_token_ids) or -1),
                continuous_batching_config=self._batching_config(),
            )
            manager.logit_processor = sampler
            await asyncio.to_thread(manager.warmup)  # makes the cache; without CUDA graphs nothing is computed
        except (MemoryError, ValueError, RuntimeError) as err:
            self._put_attention_back()
            raise EngineError(f"the engine can't start: {err}") from err
        if self._lora is not None:
            self._lora.attach()
            route = partial(self._route, manager.batch_processor)
            self._hooks = [self._model.register_forward_pre_hook(lambda *_: route())]
            _keep_prefixes_apart(manager.batch_processor)
        manager.start()
        self._manager = manager
        try:
            if alone is not None:
                await check_answers(self, alone, self._model)
        except BaseException:
            await self.stop()
            raise

    def num_cache_tokens(self) -> int:
        """Tokens of keys and values that the cache holds: one whole context, and a usual one for each request."""
        return max(self.max_context, self.max_num_seqs * min(self.max_context, _PLANNED_CONTEXT))

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> AsyncIterator[OutputChunk]:
        """See Engine.generate."""
        self.health()
        found = None if adapter is None else self._need_lora(adapter).find(adapter)
        if request_id in self._inboxes:
            raise DataError(f"request {request_id} is being answered already")
        check_prompt(prompt_ids, params.max_tokens, self._vocab_size, self.max_context)
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(62))
        guide = None if params.json_schema is None else self._schemas.guide(params.json_schema)
        return self._generate(request_id, prompt_ids, RowSampling(params, found, guide))

    def check_schema(self, schema: str) -> None:
        """See Engine.check_schema."""
        self._schemas.guide(schema)

    async def _generate(self, request_id: str, prompt_ids: list[int], asked: RowSampling) -> AsyncIterator[OutputChunk]:
        internal_id, inbox = f"{next(self._ids)}", asyncio.Queue[Any]()
        self._inboxes[request_id] = (internal_id, inbox)
        finished = False
        try:
            self._submit(internal_id, inbox, prompt_ids, asked)
            stream, num_seen = Detokenizer(self._decode, asked.params.stop), 0
            while not finished:
                output = await self._receive(inbox)
                if asked.guide is not None and asked.guide.error:
                    raise StuckError(f"the JSON schema can't be followed any further: {asked.guide.error}")
                new = output.generated_tokens[num_seen:]
                num_seen += len(new)
                finished = output.is_finished()
                text, taken, reason = read_tokens(stream, new, self.stop_token_ids, is_last=finished)
                num_generated = num_seen - len(new) + taken
                told = tuple(asked.logprobs[num_generated - taken : num_generated])
                yield OutputChunk(text, new[:taken], reason, len(prompt_ids), num_generated, told)
                if reason:
                    break
        finally:
            self._inboxes.pop(request_id, None)
            self._release(internal_id, cancel=not finished)

    async def abort(self, request_id: str) -> None:
        """Ends a request; whoever iterates gets EngineError. Unknown ids are ignored: it may have just ended."""
        if request_id in self._inboxes:
            internal_id, inbox = self._inboxes[request_id]
            inbox.put_nowait(EngineError(f"request {request_id} was aborted"))
            self._release(internal_id, cancel=True)

    async def load_adapter(self, name: str, directory: str) -> None:
        """Loads a directory in PEFT's format under a name, beside what runs. Raises ModelError if it doesn't fit."""
        await asyncio.to_thread(self._need_lora(name).load, name, Path(directory))

    async def unload_adapter(self, name: str) -> None:
        """Takes an adapter away; requests that run with it end as they would have."""
        self._need_lora(name).unload(name)

    def list_models(self) -> list[str]:
        """The base, then the adapters that are loaded."""
        return [self.name, *(self._lora.names() if self._lora is not None else [])]

    def _need_lora(self, name: str) -> MixedLora:
        if self._lora is None:
            raise ModelError(f"this engine serves one model, without adapters; merge {name} with `ftray export`")
        return self._lora

    def _route(self, processor: Any) -> None:
        """In the engine's thread, before each forward: which tokens of the batch are whose."""
        batch = processor.inputs_and_outputs.requests_in_batch
        asked = [(request.state.logit_processor_kwargs["asked"], request.query_length) for request in batch]
        assert self._lora is not None
        self._lora.route([(one.adapter, length) for one, length in asked], self._model.device)

    def health(self) -> None:
        """Raises EngineError unless the thread runs."""
        if self._manager is None:
            raise EngineError("the engine is not running; start it first")
        status = self._manager.background_thread_status
        # A failing thread says first that it takes nothing any more, then fails its requests, then says why, and ends.
        if status.can_accept_new_requests() or not self._manager.is_running():
            raise EngineError(f"the engine's thread died: {status.fatal_error or 'without a word'}")

    async def stop(self) -> None:
        """Ends the thread, fails what was running with EngineError and frees the cache. May be called twice."""
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

    def _submit(self, internal_id: str, inbox: asyncio.Queue[Any], prompt_ids: list[int], asked: RowSampling) -> None:
        strays = self._manager.output_router.output_queue
        while not strays.empty():  # last words of requests that were cancelled; nobody else would take them
            strays.get_nowait()
        self._manager.register_result_handler(internal_id, inbox.put_nowait)
        accepted = self._manager.add_request(
            prompt_ids,
            request_id=internal_id,
            max_new_tokens=asked.params.max_tokens,
            eos_token_id=list(self.stop_token_ids) or -1,
            streaming=True,
            asked=asked,
        )
        if accepted is None:
            self.health()
            raise EngineError("the engine takes no requests any more")

    async def _receive(self, inbox: asyncio.Queue[Any]) -> Any:
        """The newest output (they are cumulative). A thread can die without a word, so look after it while waiting."""
        while inbox.empty():
            try:
                async with asyncio.timeout(_WATCH_S):
                    output = await inbox.get()
                    break
            except TimeoutError:
                await asyncio.sleep(0)  # what the thread said last is delivered before it is called dead
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

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _batching_config(self) -> Any:
        # Everything that would otherwise be derived from the machine's free memory (90% of it) is given.
        return ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            # one more page a request: a page is held by one request, and the last one is never full
            num_blocks=math.ceil(self.num_cache_tokens() / _PAGE_SIZE) + self.max_num_seqs,
            max_batch_tokens=max(_MAX_BATCH_TOKENS, self.max_num_seqs),
            max_requests_per_batch=self.max_num_seqs,
            max_blocks_per_request=0,
            use_cuda_graph=False,  # RowSampler runs Python for each batch
            use_async_batching=False,
            auto_switch_to_flash=False,  # would look for kernels on the hub
            seed=0,
        )

    def _use_fitting_attention(self) -> None:
        name = attention_of(self._model.config)
        if caps_scores(self._model.config):
            use_capped()
            self._attention = name
            self._model.set_attn_implementation(PAGED)
        elif name not in ("sdpa", "eager", "paged|eager") and not name.startswith("flash_attention"):
            self._attention = name  # e.g. one that training registered for packed rows
            self._model.set_attn_implementation("sdpa")

    def _put_attention_back(self) -> None:
        if self._attention is not None:
            self._model.set_attn_implementation(self._attention)
            self._attention = None


def _keep_prefixes_apart(processor: Any) -> None:
    """Prompts that begin alike share keys and values only under the same adapter.

    Blocks are known by a hash over their tokens; in what is hashed, each adapter turns the ids into others of its own.
    """
    cache, scheduler = processor.cache, processor.scheduler

    def salted(request_id: str, token_ids: list[int]) -> list[int]:
        state = scheduler.active_requests.get(request_id) or scheduler.waiting_requests[request_id]
        adapter = state.logit_processor_kwargs["asked"].adapter
        if adapter is None:
            return token_ids
        salt = int.from_bytes(blake2b(b"%d" % adapter.serial, digest_size=4).digest(), "little") >> 2
        return [token ^ salt for token in token_ids]

    search = cache.search_prefix_match
    cache.search_prefix_match = lambda request_id, token_ids: search(request_id, salted(request_id, token_ids))
    for allocator in cache.cache_allocators.values():

        def mark(
            request_id: str, token_ids: list[int], count: int, plain: Any = allocator.mark_complete_blocks
        ) -> None:
            plain(request_id, salted(request_id, token_ids), count)

        allocator.mark_complete_blocks = mark


def find_stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the chat template's, the tokenizer's and the model's own."""
    return stop_tokens(tokenizer, getattr(model.generation_config, "eos_token_id", None))


def stop_tokens(tokenizer: Any, own: int | list[int] | None) -> tuple[int, ...]:
    """The same, from what a model's generation config calls eos_token_id."""
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
