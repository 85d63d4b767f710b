"""The whole run file: RunConfig, derived values, and the functions that read it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from ftray.config import loader
from ftray.config.base import Section, defaults
from ftray.config.constraints import impossible
from ftray.config.data import DataConfig
from ftray.config.evaluate import EvaluateConfig
from ftray.config.method import MethodConfig
from ftray.config.model import ModelConfig
from ftray.config.parallel import ScaleConfig
from ftray.config.serve import ServeConfig
from ftray.config.tracking import TrackingConfig
from ftray.config.train import CheckpointConfig, DeepSpeedConfig, TrainConfig
from ftray.config.tune import TuneConfig
from ftray.errors import ConfigError
from ftray.redact import holds_secret

FULL_LEARNING_RATE = 2e-5  # that of TRL and the usual recipes for all weights


class RunConfig(Section):
    """One run: the whole file."""

    name: str
    """Name of the run. A run owns `<storage>/<name>/` and resumes there."""
    storage: str = Field("runs", min_length=1)
    """Directory or `s3://bucket/prefix` that holds runs."""
    model: ModelConfig
    method: MethodConfig = defaults()
    data: DataConfig
    train: TrainConfig = defaults()
    deepspeed: DeepSpeedConfig = defaults()
    scale: ScaleConfig = defaults()
    checkpoint: CheckpointConfig = defaults()
    evaluate: EvaluateConfig = defaults()
    serve: ServeConfig = defaults()
    tracking: TrackingConfig = defaults()
    tune: TuneConfig | None = None

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value):
            raise ValueError("must be 1 to 63 letters, digits, '.', '_' or '-', with a letter or digit at both ends")
        return value

    @model_validator(mode="before")
    @classmethod
    def _rate_of_method(cls, tree: Any) -> Any:
        """Full fine-tuning needs a smaller learning rate than adapters."""
        sections = [tree.get(key) if isinstance(tree, dict) else None for key in ("method", "train")]
        method, train = ({} if section is None else section for section in sections)
        if isinstance(method, dict) and isinstance(train, dict) and method.get("type") == "full":
            return {**tree, "train": {"learning_rate": FULL_LEARNING_RATE, **train}}
        return tree

    @model_validator(mode="after")
    def _batch_divides(self) -> RunConfig:
        batch, workers, micro = self.train.global_batch_size, self.scale.num_workers, self.train.micro_batch_size
        if not isinstance(workers, int):
            if not self.world_sizes:
                by = "no number of workers" if micro == "auto" else f"micro_batch_size ({micro}) × no number of workers"
                raise ValueError(
                    f"train.global_batch_size ({batch}) can be divided by {by} from {workers.min} to {workers.max} "
                    "(scale.num_workers); widen the range, or change the batch"
                )
            return self
        unit = workers * (1 if micro == "auto" else micro)
        if batch % unit:
            below, above = batch // unit * unit, -(-batch // unit) * unit
            product = (
                f"num_workers ({workers})"
                if micro == "auto"
                else f"micro_batch_size × num_workers ({micro} × {workers} = {unit})"
            )
            remedy = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"train.global_batch_size ({batch}) must be a multiple of {product}; try {remedy}")
        return self

    @model_validator(mode="after")
    def _has_eval_data(self) -> RunConfig:
        for key, value in (("every", self.evaluate.every), ("early_stopping", self.evaluate.early_stopping)):
            if value is not None and self.data.eval is None:
                raise ValueError(
                    f"evaluate.{key} ({value}) needs eval data; set data.eval, for example {{fraction: 0.1}}"
                )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> RunConfig:
        if (sentence := impossible(self.model_dump(include={"method", "train", "deepspeed"}))) is not None:
            raise ValueError(sentence)
        return self

    @model_validator(mode="after")
    def _gates_have_data(self) -> RunConfig:
        if self.evaluate.gates and self.data.eval is None:
            raise ValueError("evaluate.gates needs eval data; add data.eval: {fraction: 0.1}")
        return self

    @property
    def directory(self) -> str:
        """`<storage>/<name>`, not made absolute."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def micro_batch_size(self) -> int:
        """Packed sequences per forward pass of a worker; `auto` is 1 until the memory model decides."""
        return 1 if self.train.micro_batch_size == "auto" else self.train.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per worker and optimizer step, at the largest number of workers."""
        return self.train.global_batch_size // (self.world_sizes[0] * self.micro_batch_size)

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of workers that scale.num_workers allows and that divide the global batch, largest first."""
        batch = self.train.global_batch_size
        micro = 1 if self.train.micro_batch_size == "auto" else self.train.micro_batch_size
        sizes = range(self.scale.max_workers, self.scale.min_workers - 1, -1)
        return [size for size in sizes if batch % (size * micro) == 0]

    def identity(self) -> dict[str, Any]:
        """The keys that change the result, which the config hash covers. Error limits are not among them."""
        tree = self.model_dump(
            mode="json",
            include={"model", "method", "data", "train", "deepspeed"},
            exclude={
                "data": {"max_bad_records"},
                "train": {"max_bad_steps", "hang_timeout_s", "gradient_checkpointing"},
            },
        )
        clean = self.data.clean  # `report` changes nothing
        tree["data"]["clean"] = {key: value for key, value in tree["data"]["clean"].items() if value == "drop"}
        if clean.quality == "drop":
            tree["data"]["clean"]["min_answer_chars"] = clean.min_answer_chars
        return tree

    @property
    def config_hash(self) -> str:
        """Twelve hex digits over `identity()`."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_run(tree: dict[str, Any], origin: str) -> RunConfig:
    """Validates a tree of plain values.

    Args:
        tree: The tree, as read from YAML.
        origin: Name of the file, for messages.

    Raises:
        ConfigError: One line per wrong key.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as err:
        lines = loader.explain(err, RunConfig, tree)
    raise ConfigError(f"{origin}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{origin}:", *lines]))


def load_run(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run file and applies `key.sub=value` overrides.

    Raises:
        ConfigError: The file is missing or malformed, a key is unknown, a value is wrong or holds a password or key.
    """
    tree = loader.read_yaml(Path(path))
    for text in overrides or []:
        loader.apply_override(tree, text)
    run = parse_run(tree, str(path))
    if (key := _key_with_secret(tree)) is not None:
        raise ConfigError(
            f"{path}: {key} holds a password or key, which would be stored with the run and its model; remove it: "
            "credentials come from the environment"
        )
    return run


def _key_with_secret(tree: Any, key: str = "") -> str | None:
    """The dotted key of the first text that contains a secret, or None."""
    if isinstance(tree, str):
        return key if holds_secret(tree) else None
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    keys = (_key_with_secret(value, f"{key}.{part}".lstrip(".")) for part, value in below)
    return next((each for each in keys if each is not None), None)


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two config trees differ, with both values, for messages."""
    differences = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            differences += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            differences.append(f"{prefix}{key} ({json.dumps(a)} → {json.dumps(b)})")
    return differences
