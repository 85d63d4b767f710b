"""One run: the whole file, what follows from it by arithmetic, and the ways to read it."""

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


class RunConfig(Section):
    """One run: the whole file."""

    name: str
    """Names the run and makes it resumable; it owns `<storage>/<name>/`."""
    storage: str = Field("runs", min_length=1)
    """Directory or `s3://bucket/prefix` under which runs live."""
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
    def _heldout_is_there(self) -> RunConfig:
        for key, value in (("every", self.evaluate.every), ("early_stopping", self.evaluate.early_stopping)):
            if value is not None and self.data.eval is None:
                raise ValueError(
                    f"evaluate.{key} ({value}) needs held-out data; give data.eval, e.g. {{fraction: 0.1}}"
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
            raise ValueError("evaluate.gates needs held-out data to judge by; add data.eval: {fraction: 0.1}")
        return self

    @property
    def directory(self) -> str:
        """`<storage>/<name>`, as given (not made absolute)."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def micro_batch_size(self) -> int:
        """Rows a worker computes at once; `auto` is 1 until memory is modelled."""
        return 1 if self.train.micro_batch_size == "auto" else self.train.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a worker computes for one optimizer step, at the largest number of workers."""
        return self.train.global_batch_size // (self.world_sizes[0] * self.micro_batch_size)

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of workers that scale.num_workers allows and the global batch can be divided by, largest first."""
        rows = self.train.global_batch_size
        micro = 1 if self.train.micro_batch_size == "auto" else self.train.micro_batch_size
        sizes = range(self.scale.max_workers, self.scale.min_workers - 1, -1)
        return [size for size in sizes if rows % (size * micro) == 0]

    def identity(self) -> dict[str, Any]:
        """The keys that change the result: what the config hash covers. How much may go wrong is not among them."""
        tree = self.model_dump(
            mode="json",
            include={"model", "method", "data", "train", "deepspeed"},
            exclude={
                "data": {"max_bad_records"},
                "train": {"max_bad_steps", "hang_timeout_s", "gradient_checkpointing"},
            },
        )
        clean = self.data.clean  # what is only reported changes nothing
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
    """Validates a tree of plain values. Raises ConfigError with one line for each wrong key; `origin` names the file."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as err:
        lines = loader.explain(err, RunConfig, tree)
    raise ConfigError(f"{origin}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{origin}:", *lines]))


def load_run(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run file and applies `key.sub=value` overrides.

    Raises ConfigError for a missing or malformed file, unknown keys (naming the closest), wrong values, a password or key.
    """
    tree = loader.read_yaml(Path(path))
    for text in overrides or []:
        loader.apply_override(tree, text)
    run = parse_run(tree, str(path))
    if (key := _key_with_secret(tree)) is not None:
        raise ConfigError(
            f"{path}: {key} holds a password or key, which would be kept with the run and its model; take it out: "
            "credentials come from the environment"
        )
    return run


def _key_with_secret(tree: Any, key: str = "") -> str | None:
    """The dotted key of the first text in which there is a secret; None if there is none."""
    if isinstance(tree, str):
        return key if holds_secret(tree) else None
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = (_key_with_secret(value, f"{key}.{part}".lstrip(".")) for part, value in below)
    return next((each for each in found if each is not None), None)


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two config trees differ, with both values, for messages."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({json.dumps(a)} → {json.dumps(b)})")
    return found
