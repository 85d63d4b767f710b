"""Scores one model on a share of the work: losses of examples, and generated answers. Runs in a Ray task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ftray import config
from ftray.data.eval_examples import Document
from ftray.data.packing import IGNORE_INDEX, pack_examples
from ftray.engine.batch import generate_all
from ftray.engine.protocol import Completion, SamplingParams
from ftray.engine.transformers.engine import find_stop_tokens
from ftray.evaluate.metrics import Floats
from ftray.events.types import PhaseStarted
from ftray.model.load import load_base, load_tokenizer
from ftray.model.lora import dtype_of
from ftray.train.batch import collate
from ftray.train.checkpoint.catalog import CheckpointRef
from ftray.train.checkpoint.restore import load_tuned
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.prompt_tuning import PromptTuning
from ftray.train.objectives.sft import Sft


@torch.no_grad()
def generate_prompt_tuned(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    on_done: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Greedy `engine.batch.generate_all` for a PEFT prompt-tuning model in eval mode."""
    causal = model.get_base_model()
    virtual = model.get_prompt(batch_size=1)
    stops = find_stop_tokens(causal, tokenizer)
    completions = []
    for prompt in prompts:
        began_s = time.monotonic()
        tokens = causal.get_input_embeddings()(torch.tensor([prompt], device=virtual.device))
        embeds = torch.cat([virtual.to(tokens.dtype), tokens], dim=1)
        with _own_settings_aside(causal):
            ids = causal.generate(  # given embeddings, it returns the new tokens only
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                max_new_tokens=params.max_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(stops) or None,
                pad_token_id=tokenizer.pad_token_id,
            )[0].tolist()
        stopped = bool(ids) and ids[-1] in stops
        shown = ids[:-1] if stopped else ids
        text = str(tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        completions.append(Completion(text, ids, "stop" if stopped else "length", time.monotonic() - began_s))
        if on_done:
            on_done(len(completions))
    return completions


@contextmanager
def _own_settings_aside(causal: Any) -> Iterator[None]:
    """The engine, by which the base answers, knows nothing of penalties that a model's generation_config may hold."""
    from transformers import GenerationConfig

    kept, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = kept


@dataclass(frozen=True)
class ScoreTask:
    """What a model is scored on. examples, general: records as documents; prompts: ids that it answers."""

    examples: list[list[Document]] = field(default_factory=list)
    general: list[list[Document]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    def share(self, part: int, num_parts: int) -> ScoreTask:
        """Every num_parts-th item by length, so that all shares take equally long."""
        return ScoreTask(
            [self.examples[i] for i in _dealt([_size(e) for e in self.examples], part, num_parts)],
            [self.general[i] for i in _dealt([_size(e) for e in self.general], part, num_parts)],
            [self.prompts[i] for i in _dealt([len(p) for p in self.prompts], part, num_parts)],
        )

    def weight(self, num_new: int) -> int:
        """Tokens that the model processes if each answer has num_new tokens."""
        read = sum(map(_size, self.examples)) + sum(map(_size, self.general)) + sum(map(len, self.prompts))
        return read + num_new * len(self.prompts)


@dataclass(frozen=True)
class ScoreResult:
    """The result of a task.

    Attributes:
        tokens: [examples, 3]: summed loss in nats, tokens with the highest logit, trained tokens.
        general: The same for the general set.
        answers: Generated texts.
        num_tokens: Tokens of each answer.
        seconds: Latency of each answer.
        busy_s: Seconds of generation, over all tasks.
    """

    tokens: Floats
    general: Floats
    answers: list[str]
    num_tokens: list[int]
    seconds: list[float]
    busy_s: float


def merge(parts: Sequence[ScoreResult], work: ScoreTask) -> ScoreResult:
    """Merges the results of all shares into the order of the whole task."""

    def places(sizes: list[int]) -> list[int]:
        order = [i for part in range(len(parts)) for i in _dealt(sizes, part, len(parts))]
        return sorted(range(len(order)), key=order.__getitem__)

    examples, general = (places([_size(e) for e in each]) for each in (work.examples, work.general))
    prompts = places([len(p) for p in work.prompts])
    answers, num_tokens, seconds = (
        [[x for p in parts for x in getattr(p, name)][i] for i in prompts]
        for name in ("answers", "num_tokens", "seconds")
    )
    return ScoreResult(
        np.concatenate([p.tokens for p in parts])[examples],
        np.concatenate([p.general for p in parts])[general],
        answers,
        num_tokens,
        seconds,
        sum(p.busy_s for p in parts),
    )


def _size(documents: list[Document]) -> int:
    return sum(len(ids) for ids, _ in documents)


def _dealt(sizes: list[int], part: int, num_parts: int) -> list[int]:
    """Indices of a share, longest first."""
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))[part::num_parts]


def score(run: config.RunConfig, checkpoint: CheckpointRef | None, work: ScoreTask, channel: Any) -> ScoreResult:
    """Losses and answers of one model: the base (checkpoint is None) or a checkpoint."""
    torch.set_num_threads(max(1, int(run.scale.cpus_per_worker)))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    precision = run.train.precision
    if checkpoint is None:
        model: Any = load_base(run.model, dtype_of(precision), quantize=run.method.type == "qlora")
    else:
        model = load_tuned(run, checkpoint, precision)
    model = model.to(device).eval()
    tokenizer = load_tokenizer(run.model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    is_prompted = checkpoint is not None and run.method.type == "prompt-tuning"
    summed = ObjectiveModel(model, PromptTuning() if is_prompted else Sft()).eval()
    size = run.micro_batch_size
    tokens, general = (
        score_documents(summed, records, run.data.max_seq_len, size, int(pad), device)
        for records in (work.examples, work.general)
    )
    began_s = time.monotonic()
    answered = _answer(model, tokenizer, work.prompts, run.evaluate.max_new_tokens, channel)
    return ScoreResult(
        tokens,
        general,
        [a.text.strip() for a in answered],
        [len(a.token_ids) for a in answered],
        [a.seconds for a in answered],
        time.monotonic() - began_s,
    )


def _answer(model: Any, tokenizer: Any, prompts: list[list[int]], max_tokens: int, channel: Any) -> list[Completion]:
    params = SamplingParams(max_tokens=max_tokens)

    def on_done(_: int) -> None:
        channel.record.remote(PhaseStarted("answered"))

    if hasattr(model, "prompt_encoder"):
        return generate_prompt_tuned(model, tokenizer, prompts, params, on_done=on_done)
    num_seqs = 64 if model.device.type == "cuda" else 16
    return generate_all(model, tokenizer, prompts, params, max_num_seqs=num_seqs, on_done=on_done)


def score_documents(
    model: ObjectiveModel,
    records: Sequence[Sequence[Document]],
    max_seq_len: int,
    rows_at_once: int,
    pad_id: int,
    device: torch.device,
) -> Floats:
    """Returns [records, 3]: summed loss, hits and trained tokens of each record, computed on packed sequences.

    The sequences are longer than max_seq_len if a record is.
    """
    objective = model.objective
    assert isinstance(objective, Sft)
    documents = [(owner, document) for owner, record in enumerate(records) for document in record]
    sums = np.zeros((len(records), 3))
    width = max([max_seq_len, *(len(ids) for _, (ids, _) in documents)])
    rows = pack_examples([document for _, document in documents], width, pad_id)
    for lo in range(0, len(rows), rows_at_once):
        part = rows[lo : lo + rows_at_once]
        ids, labels, positions = (
            np.stack([getattr(r, n) for r in part]) for n in ("input_ids", "labels", "position_ids")
        )
        batch = collate(ids, labels, positions, np.array([r.num_tokens for r in part], np.int32), device)
        losses, hits = objective.token_scores(model, batch)
        places = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        document = torch.bucketize(places, batch.cu_seqlens[1:].long(), right=True).cpu().numpy()
        owners = np.array([documents[i][0] for row in part for i in row.documents], np.int64)[document]
        sums_per_token = np.stack([losses.cpu().numpy(), hits.cpu().numpy(), np.ones(len(owners))], axis=-1)
        np.add.at(sums, owners, sums_per_token.astype(np.float64))
    return sums
