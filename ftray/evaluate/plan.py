"""The evaluation plan: which examples, questions, pairs and few-shot prompts each model is scored on.

Also checks the inputs of an evaluation before Ray starts: the JSON schema, the general set, pairs and libraries.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ftray import config, storage
from ftray.chat import ChatFormat, Conversation, Message
from ftray.data.chunks import streams
from ftray.data.eval_examples import EvalExample, check_eval_split, pick_shots, read_samples, read_set
from ftray.data.index import build_index
from ftray.data.prepare import check_index
from ftray.data.sources import list_shards
from ftray.errors import ConfigError, DataError
from ftray.evaluate.score import ScoreTask
from ftray.model.load import load_tokenizer, resolve_base, tokenizer_hash

EMBEDDED = "embedded:general"
LIBRARIES = {  # metric → (required module, extra that installs it)
    "bertscore": ("bert_score", "bertscore"),
    "bleu": ("sacrebleu", "evaluate"),
    "chrf": ("sacrebleu", "evaluate"),
    "classes": ("sklearn", "evaluate"),
}


def check_inputs(run: config.RunConfig) -> None:
    """Checks the inputs of `ftray evaluate` in advance. Raises ConfigError or DataError."""
    check_eval_split(run.data)
    read_schema(run.evaluate)
    read_pairs(run.evaluate)
    metrics = run.evaluate.metrics
    if "general" in metrics:
        try:
            list_shards(general_path(run.evaluate))
        except DataError as err:
            raise DataError(f"evaluate.general: {str(err).rpartition('; ')[0] or err}; correct the path") from None
    for metric in metrics:
        library, extra = LIBRARIES.get(metric, (None, None))
        if library is not None and importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"evaluate.metrics has {metric}, which needs a library: pip install 'ftray[{extra}]', or remove it"
            )
    encoder = run.evaluate.bertscore_model
    if encoder is not None and not (Path(encoder).expanduser() / "config.json").exists():
        raise ConfigError(
            f"evaluate.bertscore_model {encoder} is not a model directory (it has no config.json); correct the path"
        )


def general_path(section: config.EvaluateConfig) -> str:
    """Path of the general set. The embedded one is part of the package."""
    return str(Path(__file__).with_name("general.jsonl")) if section.general == EMBEDDED else section.general


def read_schema(section: config.EvaluateConfig) -> Any:
    """The JSON schema of the metric `json`, or None. Raises ConfigError."""
    if section.json_schema is None:
        return None
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    uri = storage.absolute(section.json_schema)
    if not storage.exists(uri):
        raise ConfigError(f"evaluate.json_schema {section.json_schema} does not exist; correct the path")
    try:
        schema = json.loads(storage.read_bytes(uri))
        validator_for(schema).check_schema(schema)
    except SchemaError as err:
        raise ConfigError(
            f"evaluate.json_schema {section.json_schema} is not a JSON schema: {err.message}; correct it"
        ) from None
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"evaluate.json_schema {section.json_schema} is not JSON: {err}; correct it") from None
    return schema


def read_pairs(section: config.EvaluateConfig) -> list[tuple[str, str]]:
    """Reads pairs of prompts that differ in one attribute. Raises ConfigError naming the malformed line."""
    if section.pairs is None:
        return []
    uri = storage.absolute(section.pairs)
    if not storage.exists(uri):
        raise ConfigError(f"evaluate.pairs {section.pairs} does not exist; correct the path")
    pairs = []
    for number, line in enumerate(storage.read_bytes(uri).splitlines(), 1):
        try:
            tree = json.loads(line)
            a, b = tree["a"], tree["b"]
        except (ValueError, KeyError, TypeError):
            a = b = None
        if not (isinstance(a, str) and isinstance(b, str) and a.strip() and b.strip()):
            raise ConfigError(
                f'evaluate.pairs {section.pairs}, line {number}: must be {{"a": "a prompt", "b": "the other"}}; correct it'
            )
        pairs.append((a, b))
    if not pairs:
        raise ConfigError(f"evaluate.pairs {section.pairs} contains no pair; add one, or remove the key")
    return pairs


NO_ANSWERS = {"loss", "general"}  # metrics that need no generated answers
MAX_LABELS = 1000


@dataclass(frozen=True)
class EvalPlan:
    """What is scored.

    Attributes:
        samples: Examples of the eval set.
        questions: Indices of the samples that the models answer.
        pairs: Pairs of prompts that differ in one attribute.
        tasks: Work of each model, by model name.
        few_shot_of: Indices of the samples that the few-shot base is scored on.
        labels: Labels of the metric `classes`.
    """

    samples: list[EvalExample]
    questions: list[int]
    pairs: list[tuple[str, str]]
    tasks: dict[str, ScoreTask]
    few_shot_of: list[int]
    labels: list[str]

    @property
    def references(self) -> list[str]:
        """Reference answers of the questions."""
        return [turns_of(self.samples[i])[-1].content for i in self.questions]


def make_plan(run: config.RunConfig, run_dir: str) -> EvalPlan:
    """Reads the eval set and plans the work of each model. Needs a started Ray."""
    section = run.evaluate
    load = partial(load_tokenizer, run.model)
    tokenizer = load()
    chat, identity = ChatFormat(tokenizer), tokenizer_hash(tokenizer)
    train_stream, stream = streams(run.data, load, section.slices)
    assert stream is not None
    data_dir, chunk_bytes = storage.join(run_dir, "data"), int(run.data.chunk_mb * 1e6)
    index = build_index(stream, chunk_bytes, data_dir, identity)
    check_index(index, stream, "eval", run.data.max_bad_records, data_dir)
    samples = read_samples(index, stream, section.num_examples)
    if section.slices is not None and not any(sample.slice for sample in samples):
        raise DataError(f"evaluate.slices: no record of the eval set has the column {section.slices}; correct it")
    questions = (
        [i for i, sample in enumerate(samples) if sample.is_question] if set(section.metrics) - NO_ANSWERS else []
    )
    labels = _labels(run, [samples[i] for i in questions]) if "classes" in section.metrics else []
    questions, pairs = questions[: section.num_generations], read_pairs(section)
    pair_prompts = [chat.encode_prompt(Conversation((Message("user", text),))) for pair in pairs for text in pair]
    general = (
        read_set(general_path(section), "evaluate.general", chat, run.data.max_seq_len)
        if ("general" in section.metrics)
        else []
    )
    prompts = [chat.encode_prompt(conversation_of(samples[i]).until(-1)) for i in questions]
    whole = ScoreTask([s.documents for s in samples], [g.documents for g in general], prompts + pair_prompts)
    tasks, few_shot_of = {"base": whole, "tuned": whole}, []
    if section.few_shot:
        train_index = build_index(train_stream, chunk_bytes, data_dir, identity)
        shots = pick_shots(train_index, train_stream, section.few_shot, [s for s in samples if s.is_question])
        few_shot_of = [i for i, s in enumerate(samples) if s.conversation is not None]
        tasks = {
            "base": whole,
            "few_shot": _few_shot(
                run, ChatFormat(tokenizer, train_on=stream.train_on), samples, few_shot_of, questions, shots
            ),
            "tuned": whole,
        }
    return EvalPlan(samples, questions, pairs, tasks, few_shot_of, labels)


def _labels(run: config.RunConfig, questions: Sequence[EvalExample]) -> list[str]:
    """The labels of `data.labels`, or all reference answers if it is not set."""
    if run.data.labels is not None:
        return [label.strip() for label in run.data.labels]
    labels = sorted({turns_of(q)[-1].content.strip() for q in questions})
    if len(labels) > MAX_LABELS:
        raise DataError(
            f"evaluate.metrics has classes, but the eval set has {len(labels)} different answers; set data.labels"
        )
    return labels


def _few_shot(
    run: config.RunConfig,
    chat: ChatFormat,
    samples: Sequence[EvalExample],
    places: Sequence[int],
    questions: Sequence[int],
    shots: Sequence[Sequence[Message]],
) -> ScoreTask:
    """Conversations with the shots as earlier turns, after the system message. The shots are not scored."""
    from transformers import AutoConfig

    def longer(conversation: Conversation) -> Conversation:
        messages = conversation.messages
        head = [m for m in messages[:1] if m.role == "system"]
        turns = (*head, *(turn for shot in shots for turn in shot), *messages[len(head) :])
        return Conversation(turns, conversation.tools)

    examples = [chat.encode_example(longer(conversation_of(samples[i]))).documents() for i in places]
    prompts = [chat.encode_prompt(longer(conversation_of(samples[i]).until(-1))) for i in questions]
    longest = max(
        [len(ids) for documents in examples for ids, _ in documents]
        + [len(ids) + run.evaluate.max_new_tokens for ids in prompts],
        default=0,
    )
    base = resolve_base(run.model)
    known = AutoConfig.from_pretrained(base, revision=run.model.revision, trust_remote_code=run.model.trust_remote_code)
    context = getattr(known.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise DataError(
            f"evaluate.few_shot ({len(shots)}) makes conversations of up to {longest} tokens, more than the model's context of "
            f"{context}; lower it"
        )
    return ScoreTask([[(np.asarray(i, np.int32), np.asarray(m, bool)) for i, m in e] for e in examples], [], prompts)


def conversation_of(sample: EvalExample) -> Conversation:
    """The conversation of a sample that has one."""
    assert sample.conversation is not None
    return sample.conversation


def turns_of(sample: EvalExample) -> tuple[Message, ...]:
    """Turns of a conversation."""
    return conversation_of(sample).messages
