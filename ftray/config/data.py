"""The section `data`: sources, split, cleaning, rows."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ftray.config.base import Float, Int, Section, defaults


class SourceConfig(Section):
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
    def _columns_fit_format(self) -> SourceConfig:
        if self.columns is None and self.format == "columns":
            raise ValueError("format is 'columns' but the key columns is missing; add columns: {user: …, assistant: …}")
        if self.columns is not None and self.format not in ("auto", "columns"):
            raise ValueError(f"columns and format '{self.format}' exclude each other; drop one of them")
        if self.columns is not None and not {"user", "assistant"} <= self.columns.keys():
            raise ValueError("columns must name at least user and assistant")
        return self


class SplitConfig(Section):
    """Held-out records taken from the training sources."""

    fraction: Annotated[Float, Field(gt=0, lt=1)]
    """Share of records held out; chosen by each record's hash, so that it stays put when data is added."""
    stratify: str | None = Field(None, min_length=1)
    """Column of a class: each class has a held-out record as soon as it has 1 / fraction different records."""
    group: str | None = Field(None, min_length=1)
    """Column of a group (a customer, a document): held out as a whole, by the hash of its value."""

    @model_validator(mode="after")
    def _one_column(self) -> SplitConfig:
        if self.stratify is not None and self.group is not None:
            raise ValueError(
                "stratify and group exclude each other: a whole group can't be shared out; drop one of them"
            )
        return self


def _off_is_text(value: object) -> object:
    return "off" if value is False else value  # YAML reads the bare word `off` as false


Mode = Annotated[Literal["report", "drop", "off"], BeforeValidator(_off_is_text)]


class CleanConfig(Section):
    """What is looked for over all records: counted and listed (`report`), taken out of training (`drop`), or not (`off`)."""

    duplicates: Mode = "report"
    """Training records that say the same as an earlier one, but for white space."""
    near_duplicates: Mode = "report"
    """Training records that say nearly the same as an earlier one: other casing, punctuation, order, a word or two. What a tenth
    of the records, and more than 20, have in common is taken for a template: copies of one record as many are not told."""
    contamination: Mode = "report"
    """Training records that hold a question, or most of the word sequences, of a held-out record."""
    quality: Mode = "report"
    """Records with a very short answer, mostly repeated lines, or many characters that can't be printed."""
    min_answer_chars: Annotated[Int, Field(ge=0)] = 2
    """Answers shorter than this count as very short (with data.labels, none does)."""


class DataConfig(Section):
    """Where records come from and how they become rows."""

    max_seq_len: Annotated[Int, Field(ge=16)] = 2048
    """Tokens in a packed row. A longer record is a bad record; nothing is cut."""
    train: Annotated[list[SourceConfig], Field(min_length=1)]
    """Training sources."""
    eval: SplitConfig | list[SourceConfig] | None = None
    """Held-out data: `{fraction: 0.1}` of the training records, or sources of their own."""
    packing: bool = True
    """Pack several records into a row, with attention kept inside each. Off: one record a row."""
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """For classification: the only answers allowed; any other makes a bad record."""
    clean: CleanConfig = defaults()
    max_bad_records: Annotated[Int, Field(ge=0)] = 0
    """Bad records tolerated: up to this many are quarantined, one more stops the run before any worker starts. What
    `data.clean` drops is wanted and isn't counted."""
    chunk_mb: Annotated[Float, Field(ge=0.0001, le=1024)] = 4.0
    """Size of the pieces (MB of a shard) that are read, packed and shuffled as one."""

    @field_validator("eval", mode="before")
    @classmethod
    def _eval_shape(cls, value: object) -> object:
        if (isinstance(value, dict) and "path" in value) or not isinstance(value, (dict, list, SplitConfig, NoneType)):
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
    def _weights_all_or_none(cls, value: list[SourceConfig]) -> list[SourceConfig]:
        given = [s.weight is not None for s in value]
        if any(given) and not all(given):
            bare = value[given.index(False)].path
            raise ValueError(f"gives {bare} no weight while others have one; give each source a weight, or none")
        return value
