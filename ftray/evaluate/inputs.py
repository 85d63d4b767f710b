"""What evaluation needs besides data and models, looked at before Ray starts: schema, general set, pairs, libraries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ftray import config, storage
from ftray.data.eval_examples import check_eval_split
from ftray.data.sources import list_shards
from ftray.errors import ConfigError, DataError

EMBEDDED = "embedded:general"
LIBRARIES = {  # metric → the module that it needs, the extra that brings it
    "bertscore": ("bert_score", "bertscore"),
    "bleu": ("sacrebleu", "evaluate"),
    "chrf": ("sacrebleu", "evaluate"),
    "classes": ("sklearn", "evaluate"),
}


def check_inputs(run: config.RunConfig) -> None:
    """Raises ConfigError or DataError, in one sentence, for what `ftray evaluate` would stumble over later."""
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
            f"evaluate.bertscore_model {encoder} is no model directory (it has no config.json); correct the path"
        )


def general_path(section: config.EvaluateConfig) -> str:
    """Where the general set is; what is embedded comes with the package."""
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
            f"evaluate.json_schema {section.json_schema} is no JSON schema: {err.message}; correct it"
        ) from None
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"evaluate.json_schema {section.json_schema} is not JSON: {err}; correct it") from None
    return schema


def read_pairs(section: config.EvaluateConfig) -> list[tuple[str, str]]:
    """Pairs of prompts that differ in one attribute. Raises ConfigError naming the line that is none."""
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
        raise ConfigError(f"evaluate.pairs {section.pairs} holds no pair; add one, or leave the key out")
    return pairs
