"""Every knob of a run: the run file's schema, its YAML, its overrides, and what follows from it by arithmetic.

Knows nothing of Ray, torch, data or storage; importing it costs pydantic and a YAML parser. Validators only raise;
what can be derived is a property. A run file is `load_run(path, overrides)`; every error is one ConfigError that names
the key, the value and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ftray import runfile
from ftray.errors import ConfigError


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):  # to pydantic, true is 1
        raise PydanticCustomError("number_type", "not a number")
    return value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of keys that refuses the ones it doesn't know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Model(Section):
    """The base model."""

    base: str = Field(min_length=1)
    """Hub id (`org/name`), a local directory, or `embedded:smollm2-135m-instruct`, the small model of the quickstart."""
    revision: str | None = None
    """Commit, tag or branch on the hub; pin a commit for runs that must be reproduced."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you say so here."""


class Method(Section):
    """What is trained."""

    type: Literal["full", "lora", "qlora"] = "lora"
    """`full`: every weight; `lora`: low-rank adapters on a frozen base; `qlora`: the same on a 4-bit (nf4) base."""
    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Annotated[Float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input while training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers get adapters: all but the output head, or the ends of their names."""


class Source(Section):
    """A set of shards."""

    path: str = Field(min_length=1)
    """File, directory or glob: local or `s3://…`; `hf:org/name/config:split@revision` (the hub); or
    `embedded:stdlib-docstrings/train|eval` (the quickstart's data)."""
    weight: Annotated[Float, Field(gt=0)] | None = None
    """Share of rows in the mixture, relative to the other sources. Give it to all sources or to none."""
    format: Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "text", "columns"] = "auto"
    """Shape of a record; `auto` looks at each record's keys. `columns` is implied by the key of that name."""
    columns: dict[Literal["system", "user", "assistant"], str] | None = None
    """For records of any shape: which column holds whose turn, e.g. `{user: question, assistant: answer}`."""

    @model_validator(mode="after")
    def _columns_fit_format(self) -> Source:
        if self.columns is None and self.format == "columns":
            raise ValueError("format is 'columns' but the key columns is missing; add columns: {user: …, assistant: …}")
        if self.columns is not None and self.format not in ("auto", "columns"):
            raise ValueError(f"columns and format '{self.format}' exclude each other; drop one of them")
        if self.columns is not None and not {"user", "assistant"} <= self.columns.keys():
            raise ValueError("columns must name at least user and assistant")
        return self


class Split(Section):
    """Held-out records taken from the training sources."""

    fraction: Annotated[Float, Field(gt=0, lt=1)]
    """Share of records held out; chosen by each record's hash, so that it stays put when data is added."""
    stratify: str | None = Field(None, min_length=1)
    """Column of a class: each class has a held-out record as soon as it has 1 / fraction different records."""
    group: str | None = Field(None, min_length=1)
    """Column of a group (a customer, a document): held out as a whole, by the hash of its value."""

    @model_validator(mode="after")
    def _one_column(self) -> Split:
        if self.stratify is not None and self.group is not None:
            raise ValueError(
                "stratify and group exclude each other: a whole group can't be shared out; drop one of them"
            )
        return self


def _off_is_text(value: object) -> object:
    return "off" if value is False else value  # YAML reads the bare word `off` as false


Mode = Annotated[Literal["report", "drop", "off"], BeforeValidator(_off_is_text)]


class Clean(Section):
    """What is looked for over all records: counted and listed (`report`), taken out of training (`drop`), or not (`off`)."""

    duplicates: Mode = "report"
    """Training records that say the same as an earlier one, but for white space."""
    near_duplicates: Mode = "report"
    """Training records that say nearly the same as an earlier one: other casing, punctuation, order, a word or two."""
    overlap: Mode = "report"
    """Training records that hold a question, or most of the word sequences, of a held-out record."""
    quality: Mode = "report"
    """Records with a very short answer, mostly repeated lines, or many characters that can't be printed."""
    min_answer_chars: Annotated[Int, Field(ge=0)] = 2
    """Answers shorter than this count as very short (with data.labels, none does)."""


class Data(Section):
    """Where records come from and how they become rows."""

    max_seq_len: Annotated[Int, Field(ge=16)] = 2048
    """Tokens in a packed row. A longer record is a bad record; nothing is cut."""
    train: Annotated[list[Source], Field(min_length=1)]
    """Training sources."""
    eval: Split | list[Source] | None = None
    """Held-out data: `{fraction: 0.1}` of the training records, or sources of their own."""
    packing: bool = True
    """Pack several records into a row, with attention kept inside each. Off: one record a row."""
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """For classification: the only answers allowed; any other makes a bad record."""
    clean: Clean = Clean()
    max_bad_records: Annotated[Int, Field(ge=0)] = 0
    """Bad records tolerated: up to this many are quarantined, one more stops the run before any worker starts. What
    `data.clean` drops is wanted and isn't counted."""
    chunk_mb: Annotated[Float, Field(gt=0, le=1024)] = 4.0
    """Size of the pieces (MB of a shard) that are read, packed and shuffled as one."""

    @field_validator("eval", mode="before")
    @classmethod
    def _eval_shape(cls, value: object) -> object:
        if (isinstance(value, dict) and "path" in value) or not isinstance(value, (dict, list, Split, NoneType)):
            raise ValueError("must be {fraction: 0.1} or a list of sources [{path: …}]")
        if isinstance(value, list) and not value:
            raise ValueError("is an empty list; name a source, or leave the key out")
        return value

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, value: list[str] | None) -> list[str] | None:
        plain = [label.strip() for label in value or []]
        if "" in plain:
            raise ValueError("names an empty label; remove it")
        if twice := sorted({label for label in plain if plain.count(label) > 1}):
            raise ValueError(f"gives {twice[0]!r} more than once; name each label once")
        return value

    @field_validator("train")
    @classmethod
    def _weights_all_or_none(cls, value: list[Source]) -> list[Source]:
        given = [s.weight is not None for s in value]
        if any(given) and not all(given):
            bare = value[given.index(False)].path
            raise ValueError(f"gives {bare} no weight while others have one; give each source a weight, or none")
        return value


class Train(Section):
    """Optimization."""

    epochs: Annotated[Float, Field(gt=0)] = 1.0
    """Passes over the data. Under weights: over the source that is largest relative to its weight."""
    max_steps: Positive | None = None
    """Optimizer steps; overrides epochs."""
    global_batch_size: Positive = 128
    """Packed rows in an optimizer step, over all workers; never changed by the number of workers."""
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Rows a worker computes at once; `auto` chooses."""
    learning_rate: Annotated[Float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at 0."""
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of forward and backward; the optimizer always keeps fp32 masters."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Seeds data order, adapter initialization and dropout."""
    max_bad_steps: Annotated[Int, Field(ge=0)] = 10
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""


class DeepSpeed(Section):
    """DeepSpeed's settings; the rest is derived."""

    zero_stage: Annotated[Int, Field(ge=0, le=3)] = 2
    """0: all replicated; 1: optimizer states sharded; 2: and gradients; 3: and weights."""
    overrides: dict[str, Any] = {}
    """Merged over the derived DeepSpeed config, for what has no key here."""


class Scale(Section):
    """How many workers; never changes the result beyond rounding."""

    num_workers: Positive = 1
    """Training workers: one a GPU, or one a process on CPU."""
    accelerator: str | None = None
    """GPU kind as Ray names it (A100, H100, …); left out: any GPU where the cluster has one, else CPU."""
    cpus_per_worker: Annotated[Float, Field(gt=0)] = 1.0
    """CPUs a training worker reserves; on a CPU cluster also its number of threads."""


class CheckpointSection(Section):
    """Checkpoints."""

    every: Positive | str = 200
    """Steps (`200`), or `1 epoch`, or `10 min`."""
    keep: Positive = 3
    """How many of the newest stay; the best stays besides."""

    @field_validator("every", mode="before")
    @classmethod
    def _every_reads(cls, value: object) -> object:
        text = re.fullmatch(r"(\d+(?:\.\d+)?) ?(epochs?|s|min|h)", value) if isinstance(value, str) else None
        number = float(text[1]) if text else value if isinstance(value, int) and not isinstance(value, bool) else 0
        if number <= 0:
            raise ValueError("must be a number of steps from 1 up, or like '1 epoch', '10 min', '2 h'")
        return value

    @property
    def every_epochs(self) -> float | None:
        """Epochs between checkpoints, where the key says epochs."""
        if isinstance(self.every, str) and "epoch" in self.every:
            return float(self.every.split("epoch")[0])
        return None

    @property
    def every_s(self) -> float | None:
        """Seconds between checkpoints, where the key says a time."""
        if isinstance(self.every, int) or self.every_epochs is not None:
            return None
        number, unit = re.fullmatch(r"([\d.]+) ?(s|min|h)", self.every).groups()  # type: ignore[union-attr]
        return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


class Evaluate(Section):
    """Held-out loss during training, and the comparison with the base afterwards."""

    every: Positive | None = None
    """Steps between held-out losses during training; left out: only afterwards."""
    early_stopping: Positive | None = None
    """Stop after so many held-out losses in a row without a new best; needs `every`."""
    metrics: Annotated[list[Literal["loss", "rouge", "format"]], Field(min_length=1)] = ["loss", "rouge"]
    """What base and tuned model are compared by."""
    format: str | None = None
    """Regular expression that a whole answer must match, for the metric `format`."""
    num_generations: Positive = 64
    """Held-out examples that both models answer."""
    num_shown: Annotated[Int, Field(ge=0)] = 5
    """Answers printed side by side."""
    max_new_tokens: Positive = 128
    """Longest answer, in tokens."""

    @model_validator(mode="after")
    def _format_fits(self) -> Evaluate:
        if ("format" in self.metrics) != (self.format is not None):
            raise ValueError("the metric 'format' and the key format (a regular expression) belong together; give both")
        try:
            re.compile(self.format or "")
        except re.error as err:
            raise ValueError(f"format {self.format!r} is not a regular expression: {err}") from None
        if self.early_stopping is not None and self.every is None:
            raise ValueError("early_stopping needs evaluate.every, the steps between held-out losses")
        return self


class Serve(Section):
    """The OpenAI-compatible endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs the environment variable FTRAY_API_KEY."""
    port: Annotated[Int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    min_replicas: Positive = 1
    """Replicas kept up."""
    max_replicas: Positive = 1
    """Replicas at most."""
    target_ongoing_requests: Annotated[Float, Field(gt=0)] = 8.0
    """Ongoing requests a replica that autoscaling aims for."""
    max_queued_requests: Positive = 64
    """Requests that may wait; more are answered 503."""
    max_tokens: Positive = 1024
    """Most tokens that a request may ask for; also the default."""

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Serve:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas}); raise it"
            )
        return self


class Run(Section):
    """One run: the whole file."""

    name: str
    """Names the run and makes it resumable; it owns `<storage>/<name>/`."""
    storage: str = Field("runs", min_length=1)
    """Directory or `s3://bucket/prefix` under which runs live."""
    model: Model
    method: Method = Method()
    data: Data
    train: Train = Train()
    deepspeed: DeepSpeed = DeepSpeed()
    scale: Scale = Scale()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value):
            raise ValueError("must be 1 to 63 letters, digits, '.', '_' or '-', with a letter or digit at both ends")
        return value

    @model_validator(mode="after")
    def _batch_divides(self) -> Run:
        batch, workers, micro = self.train.global_batch_size, self.scale.num_workers, self.train.micro_batch_size
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
    def _method_fits(self) -> Run:
        if self.method.type == "qlora" and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "method.type qlora with deepspeed.zero_stage 3 is not possible: 4-bit weights can't be sharded; "
                "use zero_stage 2"
            )
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
        """Micro-batches a worker computes for one optimizer step."""
        return self.train.global_batch_size // (self.scale.num_workers * self.micro_batch_size)

    def identity(self) -> dict[str, Any]:
        """The keys that change the result: what the config hash covers. How much may go wrong is not among them."""
        tree = self.model_dump(
            mode="json",
            include={"model", "method", "data", "train", "deepspeed"},
            exclude={"data": {"max_bad_records"}, "train": {"max_bad_steps"}},
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


# Keys and values of the design that this version doesn't carry out: (key, value or type or ... for any, name, remedy).
_LATER: tuple[tuple[str, object, str, str], ...] = (
    ("tune", ..., "tune", "remove the section"),
    ("method.type", "prompt", "method.type prompt", "use full, lora or qlora"),
    ("train.precision", "fp16", "train.precision fp16", "use bf16 or fp32"),
    ("scale.num_workers", dict, "scale.num_workers as a range", "give one number of workers"),
)


def _not_carried_out(tree: dict[str, Any]) -> list[str]:
    """A sentence for each of `_LATER` that the tree holds: refused by name, not as a typo."""
    lines = []
    for key, wanted, name, remedy in _LATER:
        node: Any = tree
        for part in key.split("."):
            node = node.get(part, _LATER) if isinstance(node, dict) else _LATER
        if node is not _LATER and (wanted in (..., node) or (wanted is dict and isinstance(node, dict))):
            lines.append(f"{name} is not carried out by this version of ftray; {remedy}")
    return lines


def parse_run(tree: dict[str, Any], origin: str) -> Run:
    """Validates a tree of plain values. Raises ConfigError with one line for each wrong key; `origin` names the file."""
    lines = _not_carried_out(tree)
    if not lines:
        try:
            return Run.model_validate(tree)
        except ValidationError as err:
            lines = runfile.explain(err, Run, tree)
    raise ConfigError(f"{origin}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{origin}:", *lines]))


def load_run(path: str | Path, overrides: list[str] | None = None) -> Run:
    """Reads a run file and applies `key.sub=value` overrides.

    Raises ConfigError for a missing or malformed file, unknown keys (naming the closest), wrong values.
    """
    tree = runfile.read_yaml(Path(path))
    for text in overrides or []:
        runfile.apply_override(tree, text)
    return parse_run(tree, str(path))


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
