"""Objectives: the registry, the loss as (sum, weight), the examples that they accept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ftray import config
from ftray.data.example_spec import ExampleSpec
from ftray.driver.preflight import check_examples
from ftray.errors import ConfigError
from ftray.train.batch import collate
from ftray.train.objectives import base, objective_of
from ftray.train.objectives.base import Objective, ObjectiveModel, objective_type, register
from ftray.train.objectives.prompt_tuning import PromptTuning
from ftray.train.objectives.sft import Sft
from tests import tiny


def run_of(method: str = "lora", record_format: str = "messages") -> config.RunConfig:
    data = {"train": [{"path": "p", "format": record_format}]}
    return config.parse_run({"name": "a", "model": {"base": "b"}, "data": data, "method": {"type": method}}, "test")


class Margin(Objective):
    """The negated logit of each target: not a loss to train with, but one that is easy to check."""

    name = "margin"
    examples = ExampleSpec(frozenset({"conversation"}))

    @classmethod
    def from_config(cls, run: config.RunConfig) -> Margin:
        return cls()

    def loss(self, model: ObjectiveModel, batch: Any) -> tuple[torch.Tensor, float]:
        tokens = (batch.labels[0] >= 0).nonzero()[:, 0]
        logits = model.logits(batch, tokens)
        return -logits.gather(1, batch.labels[0, tokens][:, None]).sum(), float(len(tokens))


@pytest.fixture
def margin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(base, "_OBJECTIVES", dict(base._OBJECTIVES))
    register(Margin)
    return


def test_an_objective_is_found_by_name_and_a_name_is_taken_once(margin: None) -> None:
    assert objective_type("sft") is Sft
    assert objective_type("margin") is Margin
    with pytest.raises(ValueError, match="margin is registered twice"):
        register(Margin)


def test_the_method_chooses_the_objective() -> None:
    assert type(objective_of(run_of("full"))) is Sft
    assert type(objective_of(run_of("prompt-tuning"))) is PromptTuning


def test_another_objective_uses_the_same_model_and_batch(margin: None) -> None:
    model = tiny.make_model().eval()
    ids = np.arange(3, 19, dtype=np.int32)[None]
    positions = np.concatenate([np.arange(10), np.arange(6)]).astype(np.int32)[None]
    batch = collate(ids, np.roll(ids, -1, 1), positions, np.array([16], np.int32))
    with torch.no_grad():
        loss, weight = ObjectiveModel(model, Margin())(batch)
        parts = [model(input_ids=batch.input_ids[:, part]).logits[0] for part in (slice(0, 10), slice(10, 16))]
    logits = torch.cat(parts)
    assert weight == 16
    assert float(loss) == pytest.approx(-float(logits.gather(1, batch.labels[0][:, None]).sum()), rel=1e-5)


def test_a_format_that_the_objective_does_not_accept_is_refused(margin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_examples(run_of(record_format="text"))
    monkeypatch.setattr("ftray.train.objectives.objective_of", lambda run: Margin())
    check_examples(run_of())
    check_examples(run_of(record_format="auto"))
    with pytest.raises(ConfigError, match="p has format text, which the objective margin does not accept"):
        check_examples(run_of(record_format="text"))
