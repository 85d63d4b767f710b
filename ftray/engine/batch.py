"""Uses the engine without a server: answers for a list of prompts, and an engine from a directory.

Knows nothing of HTTP, Ray or run files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ftray.engine.protocol import Completion, Engine, FinishReason, SamplingParams
from ftray.engine.transformers.engine import TransformersEngine
from ftray.errors import ModelError
from ftray.storage.model_directory import check_hub_model, check_model_directory


def generate_all(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    max_num_seqs: int = 16,
    on_done: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answers all prompts (ids), in their order.

    Restores the model's training mode and attention, and torch's random state, which continuous batching reseeds. Call it
    outside of
    an event loop.

    Args:
        on_done: Called with the number of answers so far.

    Raises:
        ContextLengthError: A prompt is too long; nothing has been computed yet.
        EngineError: The engine died.
    """
    if not prompts:
        return []
    modes = [(module, module.training) for module in model.modules()]
    cuda = [model.device] if model.device.type == "cuda" else []
    longest = max(len(ids) for ids in prompts) + params.max_tokens
    engine = TransformersEngine(
        model, tokenizer, max_num_seqs=max(1, min(max_num_seqs, len(prompts))), max_context=longest
    )
    try:
        with torch.random.fork_rng(devices=cuda):
            return asyncio.run(_generate_all(engine, prompts, params, on_done))
    finally:
        for module, training in modes:
            module.training = training


async def _generate_all(
    engine: TransformersEngine,
    prompts: list[list[int]],
    params: SamplingParams,
    on_done: Callable[[int], None] | None,
) -> list[Completion]:
    slots = asyncio.Semaphore(2 * engine.max_num_seqs)  # the engine's own queue is a list that it walks at every step
    num_done = 0

    async def answer(i: int) -> Completion:
        nonlocal num_done
        async with slots:
            result = await complete(engine, str(i), prompts[i], params)
        num_done += 1
        if on_done:
            on_done(num_done)
        return result

    await engine.start()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(i)) for i in range(len(prompts))]
    except ExceptionGroup as err:
        raise err.exceptions[0] from None  # the first to fail; the group cancelled the others
    finally:
        await engine.stop()
    return [task.result() for task in tasks]


async def complete(
    engine: Engine, request_id: str, prompt_ids: list[int], params: SamplingParams, adapter: str | None = None
) -> Completion:
    """The whole answer at once. Raises as `Engine.generate` and its iterator do."""
    began_s = time.monotonic()
    texts: list[str] = []
    token_ids: list[int] = []
    reason: FinishReason | None = None
    async for chunk in engine.generate(
        request_id, prompt_ids, params, adapter=adapter
    ):  # to its end, where the engine tidies up
        texts.append(chunk.text)
        token_ids += chunk.token_ids
        reason = chunk.finish_reason
    assert reason is not None
    return Completion("".join(texts), token_ids, reason, time.monotonic() - began_s)


def load_engine(
    model_dir: str | Path,
    *,
    name: str = "model",
    dtype: str | None = None,
    num_threads: int | None = None,
    max_num_seqs: int = 8,
    max_context: int | None = None,
    adapters: bool = False,
    revision: str | None = None,
) -> TransformersEngine:
    """An engine, not started yet, for a directory of safetensors with config and tokenizer, or for a model of a hub.

    Uses the GPU if there is one.

    Args:
        dtype: `float32`, `bfloat16`, …; None: as stored.
        num_threads: Torch's threads in this process.
        adapters: Whether adapters can be loaded.
        revision: Of a hub's model.

    Raises:
        ModelError: The directory is not a model. The message names what is missing.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    model, tokenizer = load_model(model_dir, dtype=dtype, revision=revision)
    return TransformersEngine(
        model, tokenizer, name=name, max_num_seqs=max_num_seqs, max_context=max_context, adapters=adapters
    )


def load_model(model_dir: str | Path, *, dtype: str | None = None, revision: str | None = None) -> tuple[Any, Any]:
    """A model, on the GPU if there is one, and its tokenizer. Arguments and errors are those of `load_engine`."""
    is_local = isinstance(model_dir, Path) or Path(model_dir).is_absolute() or Path(model_dir).is_dir()
    directory = Path(model_dir) if is_local else model_dir
    if isinstance(directory, Path):
        check_model_directory(directory)
    options = {"local_files_only": is_local, "trust_remote_code": False, "revision": None if is_local else revision}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a replica's log is not a terminal
    try:
        if not is_local:
            options["revision"] = check_hub_model(str(model_dir), revision)
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto", use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as err:
        reason = " ".join(str(err).split())[:300]
        raise ModelError(f"{directory} can't be loaded: {reason}; write it again with `ftray export`") from err
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, tokenizer
