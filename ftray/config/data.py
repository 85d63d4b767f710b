"""The section `data`: sources, eval split, checks, packing."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ftray.config.base import Float, Int, Section, defaults
from ftray.config.column_template import parse_template

Role = Literal["system", "user", "assistant", "messages", "tools"]


class SourceConfig(Section):
    """A set of shards."""

    path: str = Field(min_length=1)
    """File, directory or glob: local or `s3://…`; `hf:org/name/config:split@revision` (the hub); or
    `embedded:stdlib-docstrings/train|eval` (the quickstart's data)."""
    weight: Annotated[Float, Field(gt=0)] | None = None
    """Share of packed sequences in the mixture, relative to the other sources. Set it for all sources or for none."""
    format: Literal[
        "auto", "messages", "sharegpt", "prompt-completion", "query-response", "alpaca", "text", "columns"
    ] = "auto"
    """Record format; `auto` detects it from each record's keys. `columns` is implied by the key `columns`."""
    columns: (
        dict[Literal["system", "user", "assistant", "messages", "tools"], Annotated[str, Field(min_length=1)]] | None
    ) = None
    """For other formats: the column of each role, for example `{user: question, assistant: answer}`, or a template that joins
    columns: `{user: "{instruction}[\\n\\n{context}]", …}`. A part in brackets is left out if its column is empty.
    `{messages: dialog}` names a column of turns."""
    ignore: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Keys of records and turns that may stay without effect, for example `[score]`. Other unknown keys make a record bad."""
    tools: Annotated[str, Field(min_length=1)] | list[dict[str, Any]] | None = None
    """Tools of records that have none of their own: a list as in OpenAI's API, or the path of a JSON file with one."""

    @model_validator(mode="after")
    def _columns_fit_format(self) -> SourceConfig:
        if self.columns is None and self.format == "columns":
            raise ValueError("format is 'columns' but the key columns is missing; add columns: {user: …, assistant: …}")
        if self.columns is not None and self.format not in ("auto", "columns"):
            raise ValueError(f"columns and format '{self.format}' exclude each other; remove one of them")
        if self.columns is not None:
            _check_columns(self.columns)
            if self.ignore and "messages" not in self.columns:
                raise ValueError("ignore has no effect with columns, which name all that is used; remove it")
        if self.tools is not None and self.format == "text":
            raise ValueError("tools and format 'text' exclude each other; remove one of them")
        return self


def _check_columns(columns: Mapping[Role, str]) -> None:
    for role, value in columns.items():
        template = parse_template(value)
        if role in ("messages", "tools") and not template.is_name:
            raise ValueError(f"columns.{role} must be the name of a column, not a template")
    roles = set(columns)
    if "messages" in roles and roles & {"user", "assistant"}:
        raise ValueError(
            "columns names messages beside user or assistant; name either the column of turns, or the columns of roles"
        )
    if "messages" not in roles and not {"user", "assistant"} <= roles:
        raise ValueError("columns must name at least user and assistant, or messages")


class SplitConfig(Section):
    """Eval records taken from the training sources."""

    fraction: Annotated[Float, Field(gt=0, lt=1)]
    """Share of records in the eval set. They are chosen by each record's hash, so the split is stable when data is
    added."""
    stratify: str | None = Field(None, min_length=1)
    """Column of a class: each class gets an eval record as soon as it has 1 / fraction different records."""
    group: str | None = Field(None, min_length=1)
    """Column of a group (a customer, a document): a group is never split between training and eval."""

    @model_validator(mode="after")
    def _one_column(self) -> SplitConfig:
        if self.stratify is not None and self.group is not None:
            raise ValueError(
                "stratify and group exclude each other, because a group is never split; remove one of them"
            )
        return self


def _off_is_text(value: object) -> object:
    return "off" if value is False else value  # YAML reads the bare word `off` as false


Mode = Annotated[Literal["report", "drop", "off"], BeforeValidator(_off_is_text)]


class CleanConfig(Section):
    """Checks over all records: `report` counts and lists the findings, `drop` also removes the records from training,
    `off` skips the check."""

    duplicates: Mode = "report"
    """Training records that equal an earlier one except for white space."""
    near_duplicates: Mode = "report"
    """Training records that nearly equal an earlier one: other casing, punctuation, order, a word or two. Text shared
    by more than a tenth of the records (and more than 20) counts as a template, so identical copies beyond that
    number are not reported as duplicates."""
    contamination: Mode = "report"
    """Training records that contain the question, or most of the n-grams, of an eval record."""
    quality: Mode = "report"
    """Records with a very short answer, mostly repeated lines, or many unprintable characters."""
    min_answer_chars: Annotated[Int, Field(ge=0)] = 2
    """Shorter answers count as very short (not checked with data.labels)."""


class TrainOnConfig(Section):
    """The parts of a conversation that are trained on. The end token of an answer is trained on if any of its parts is."""

    assistant: bool = True
    """The text of the assistant's answers."""
    reasoning: bool = True
    """The reasoning before an answer: the fields `reasoning_content`, `thinking` and `reasoning`, or `<think>` in the text."""
    tool_calls: bool = True
    """The assistant's tool calls."""
    last_turn_only: bool = False
    """Only the last answer of a conversation."""

    @model_validator(mode="after")
    def _something(self) -> TrainOnConfig:
        if not (self.assistant or self.reasoning or self.tool_calls):
            raise ValueError(
                "assistant, reasoning and tool_calls are all false, so nothing is trained on; set one to true"
            )
        return self


class DataConfig(Section):
    """Data sources, and how records become packed sequences."""

    max_seq_len: Annotated[Int, Field(ge=16)] = 2048
    """Tokens per packed sequence."""
    too_long: Literal["error", "quarantine", "split", "truncate"] = "error"
    """Records longer than max_seq_len: `error` makes them bad records (see max_bad_records); `quarantine` sets them aside
    without limit; `split` makes several examples of a record, and `truncate` keeps its beginning. Conversations are cut after
    answers only, and what is lost is counted."""
    train: Annotated[list[SourceConfig], Field(min_length=1)]
    """Training sources."""
    eval: SplitConfig | list[SourceConfig] | None = None
    """Eval data: `{fraction: 0.1}` of the training records, or separate sources."""
    packing: bool = True
    """Pack several records into one sequence, without attention between them. `false`: one record per sequence."""
    pack_text: Literal["separate", "concatenate"] = "separate"
    """Plain text: `separate` packs each text whole; `concatenate`, for continued pretraining, joins the texts of a chunk and
    cuts where a sequence is full, so sequences have no gaps. A text continues in the next sequence without its beginning."""
    train_on: TrainOnConfig = defaults()
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """For classification: the only allowed answers. A record with another answer is a bad record."""
    clean: CleanConfig = defaults()
    max_bad_records: Annotated[Int, Field(ge=0)] = 0
    """Limit of bad records. Up to this number they are quarantined; one more stops the run before any worker starts.
    Records dropped by `data.clean` are not counted."""
    chunk_mb: Annotated[Float, Field(ge=0.0001, le=1024)] = 4.0
    """Size of a chunk in MB: the unit that is read, packed and shuffled as a whole."""

    @field_validator("eval", mode="before")
    @classmethod
    def _eval_shape(cls, value: object) -> object:
        if (isinstance(value, dict) and "path" in value) or not isinstance(value, (dict, list, SplitConfig, NoneType)):
            raise ValueError("must be {fraction: 0.1} or a list of sources [{path: …}]")
        if isinstance(value, list) and not value:
            raise ValueError("is an empty list; add a source, or remove the key")
        return value

    @model_validator(mode="after")
    def _text_fits_packing(self) -> DataConfig:
        if self.pack_text == "concatenate" and not self.packing:
            raise ValueError("pack_text: concatenate and packing: false exclude each other; remove one of them")
        return self

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, value: list[str] | None) -> list[str] | None:
        plain = [label.strip() for label in value or []]
        if "" in plain:
            raise ValueError("contains an empty label; remove it")
        if twice := sorted({label for label in plain if plain.count(label) > 1}):
            raise ValueError(f"lists {twice[0]!r} more than once; list each label once")
        return value

    @field_validator("train")
    @classmethod
    def _weights_all_or_none(cls, value: list[SourceConfig]) -> list[SourceConfig]:
        has_weight = [s.weight is not None for s in value]
        if any(has_weight) and not all(has_weight):
            bare = value[has_weight.index(False)].path
            raise ValueError(
                f"has sources with and without a weight ({bare} has none); set weight for all sources or for none"
            )
        return value
