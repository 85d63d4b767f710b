"""A sweep without Ray: what it refuses, what a trial's run is, who chooses and who gives up, what is kept and shown."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray import config, storage
from ftray.cli import main
from ftray.config import TuneConfig
from ftray.console import Console
from ftray.driver.resources import max_workers
from ftray.errors import ConfigError, DataError
from ftray.report.sweep_page import render_page
from ftray.tune.report import as_table, command_of
from ftray.tune.runner import preflight_trials
from ftray.tune.scheduler import TrialPruner
from ftray.tune.search import importance, propose
from ftray.tune.space import check_tune, corners, grid, number_of_trials, sample, trial_run
from ftray.tune.state import EvalReport, SweepState, TrialRecord, open_state, save_state, settings_of
from tests import tiny
from tests.terminal import Terminal, screen

LR = {"type": "loguniform", "low": 1e-5, "high": 1e-3}
BASE: dict[str, Any] = {
    "name": "a",
    "model": {"base": "org/m"},
    "data": {"train": [{"path": "p"}], "eval": {"fraction": 0.1}},
}


def choice(*values: Any, **more: Any) -> dict[str, Any]:
    return {"type": "choice", "values": list(values), **more}


def run_of(space: Any, top: dict[str, Any] | None = None, **tune: Any) -> config.RunConfig:
    tree = {**copy.deepcopy(BASE), **(top or {}), "tune": {"num_trials": 8, "space": space, **tune}}
    return config.parse_run(tree, "f")


def section(space: Any, **tune: Any) -> TuneConfig:
    found = run_of(space, **tune).tune
    assert found is not None
    return found


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "typo": (
        {"space": {"train.learning_rte": LR}},
        "tune.space: unknown key train.learning_rte; did you mean train.learning_rate?",
    ),
    "section": ({"space": {"train": LR}}, "tune.space: train is a section; name one of its keys"),
    "out-of-range": (
        {"space": {"train.warmup": {"type": "uniform", "low": 0, "high": 1}}},
        "tune.space with train.warmup=1.0: train.warmup (1.0) must be below 1",
    ),
    "one-bad-choice": (
        {"space": {"train.learning_rate": LR, "train.precision": choice("bf16", "fp8")}},
        'tune.space with train.precision=fp8: train.precision ("fp8") must be one of bf16, fp16, fp32',
    ),
    "two-that-exclude-each-other": (
        {"space": {"method.type": choice("lora", "qlora"), "deepspeed.zero_stage": choice(2, 3)}},
        "tune.space with method.type=qlora, deepspeed.zero_stage=3: method.type qlora with deepspeed.zero_stage 3",
    ),
    "a-value-between-the-ends": (
        {"space": {"train.global_batch_size": {"type": "randint", "low": 2, "high": 8}}, "scale": {"num_workers": 2}},
        "tune.space with train.global_batch_size=3: train.global_batch_size (3) must be a multiple of num_workers (2)",
    ),
    "deepspeed-key-of-ours": (
        {"space": {"deepspeed.overrides.fp16": choice({"enabled": True})}},
        "deepspeed.overrides.fp16",
    ),
    "no-such-metric": (
        {"space": {"train.learning_rate": LR}, "metric": "accuracy"},
        'tune.metric ("accuracy") must be',
    ),
    "no-eval": (
        {"space": {"train.learning_rate": LR}, "data": {"train": [{"path": "p"}]}},
        "tune.metric eval_loss needs an eval set, but data.eval is missing; add data.eval",
    ),
    "data": (
        {"space": {"data.max_seq_len": choice(128, 256)}},
        "data.max_seq_len changes the data, but trials share one index",
    ),
    "own-data-without-every": (
        {"space": {"data.max_seq_len": choice(128, 256)}, "own_data": True},
        "evaluate.every has no default",
    ),
    "no-result": ({"space": {"scale.num_workers": choice(1, 2)}}, "scale.num_workers does not affect training"),
    "no-such-condition": (
        {"space": {"method.rank": choice(1, 2, when={"method.type": "lora"})}},
        "tune.space: makes method.rank depend on method.type, which is not in the space; add method.type, or remove `when`",
    ),
    "circle": (
        {
            "space": {
                "method.rank": choice(1, when={"method.alpha": 1}),
                "method.alpha": choice(1, when={"method.rank": 1}),
            }
        },
        "has a cycle of conditions: method.alpha, method.rank",
    ),
    "no-trials": ({"space": {"train.learning_rate": LR}, "num_trials": None}, "tune: num_trials is missing"),
    "grid-of-a-range": ({"space": {"train.learning_rate": LR}, "search": "grid"}, "make it a choice"),
    "unknown-type": ({"space": {"train.seed": {"type": "int"}}}, "must be one of choice, uniform, loguniform, randint"),
    "unknown-word": (
        {"space": {"train.seed": {"type": "choice", "vals": [1]}}},
        "unknown key tune.space.train.seed.vals; did you mean tune.space.values?",
    ),
    "upside-down": ({"space": {"train.seed": {"type": "randint", "low": 3, "high": 2}}}, "low must be below high"),
    "log-of-nothing": ({"space": {"train.learning_rate": {**LR, "low": 0}}}, "low must be above 0"),
    "empty": ({"space": {}}, "tune.space must be a non-empty mapping"),
    "no-space": ({}, "the key tune.space is missing; add it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sweep_that_cannot_be_carried_out_is_refused_in_one_sentence(case: str) -> None:
    given, sentence = REFUSED[case]
    tune = {"num_trials": 8} | {k: v for k, v in given.items() if k not in ("data", "scale")}
    top = {k: v for k, v in given.items() if k in ("data", "scale")}
    tree = {**copy.deepcopy(BASE), **top, "tune": {k: v for k, v in tune.items() if v is not None}}
    with pytest.raises(ConfigError) as caught:
        check_tune(config.parse_run(tree, "f"))
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_without_the_section_is_told_what_one_looks_like() -> None:
    with pytest.raises(ConfigError, match="the section tune is missing") as caught:
        check_tune(config.parse_run(copy.deepcopy(BASE), "f"))
    example = yaml.safe_load(str(caught.value).split("for example ")[1])
    check_tune(config.parse_run({**copy.deepcopy(BASE), **example}, "f"))


NOT_BEGUN = {
    "tune.space.train.warmup={type: uniform, low: 0, high: 2}": "tune.space with",
    "tune.metric=bleu": "tune.metric",
    "data.eval=": "data.eval is missing",
    "data.eval=[{path: nothing}]": "the file is empty",
    "evaluate.evry=3": "did you mean evaluate.every?",
    "tune.search=bayes": "must be one of random, optuna, grid",
}


@pytest.mark.parametrize("override", NOT_BEGUN)
def test_the_verb_ends_with_2_and_a_sentence_before_ray_starts(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "a.jsonl").write_text("")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    tree = {**copy.deepcopy(BASE), "tune": {"num_trials": 2, "space": {"train.learning_rate": LR}}}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(tree))
    if "space." in override:  # a key of the space has dots: it is overridden with the space
        key, value = override.removeprefix("tune.space.").split("=", 1)
        override = f"tune.space={{{key}: {value}}}"
    assert main.main(["tune", "f.yaml", override]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert NOT_BEGUN.get(override, "tune.space with") in said[0]
    assert not ray.is_initialized()


def test_layers_and_files_that_only_some_trials_name_are_looked_at_before_ray_starts(tmp_path: Path) -> None:
    model = tiny.write_tiny_model(tmp_path / "model")
    data = tiny.write_records(tmp_path / "data", 5)
    (tmp_path / "empty").mkdir()
    top = {
        "model": {"base": str(model)},
        "data": {"train": [{"path": str(data)}], "eval": {"fraction": 0.1}},
        "evaluate": {"every": 1},
    }
    targets = choice("all-linear", ["q_proj"], ["q_prj"])
    with pytest.raises(ConfigError, match=r"has no linear layer named q_prj"):
        preflight_trials(run_of({"method.target_modules": targets, "method.rank": choice(1, 2)}, top=top))
    paths = {"data.train.0.path": choice(str(data), str(tmp_path / "empty"))}
    with pytest.raises(DataError, match="nothing in it"):
        preflight_trials(run_of(paths, top=top, own_data=True))
    preflight_trials(run_of({"method.target_modules": choice("all-linear", ["q_proj"])}, top=top))


def test_check_tells_what_a_sweep_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {**copy.deepcopy(BASE), "tune": {"num_trials": 2, "space": {"train.learning_rate": LR}}}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(tree))
    assert main.main(["check", "--fast", str(tmp_path / "f.yaml")]) == 0
    assert "2 trials (random) over train.learning_rate; early stopping by successive halving" in capsys.readouterr().out
    assert (
        main.main(["check", "--fast", str(tmp_path / "f.yaml"), "tune.space={train.lr: {type: choice, values: [1]}}"])
        == 2
    )


def test_a_space_of_many_keys_has_each_value_validated_in_a_second() -> None:
    wide = {f"train.{k}": {"type": "uniform", "low": 0.01, "high": 0.9} for k in ("warmup", "weight_decay", "epochs")}
    wide |= {f"method.{k}": {"type": "randint", "low": 1, "high": 200} for k in ("rank", "alpha", "num_virtual_tokens")}
    wide |= {"train.seed": choice(*range(50)), "train.schedule": choice("cosine", "linear", "constant")}
    check_tune(run_of(wide))
    with pytest.raises(ConfigError, match=re.escape('train.schedule ("cubic")')):
        check_tune(run_of({**wide, "train.schedule": choice("cosine", "cubic")}))


def test_a_trial_is_the_file_with_its_values_and_nothing_else() -> None:
    run = run_of({"train.learning_rate": LR, "method.rank": choice(2, 4)}, top={"train": {"epochs": 2}})
    made = trial_run(run, {"train.learning_rate": "3e-4", "method.rank": 2}, "trial-000", "/s/a/tune")
    assert (made.directory, made.tune) == ("/s/a/tune/trial-000", None)
    differing = config.differing_keys(run.identity(), made.identity())
    assert differing == ["method.rank (16 → 2)", "train.learning_rate (0.0002 → 0.0003)"]
    assert run.method.rank == 16, "the file's own settings stay as they are"


def test_a_trial_has_the_fewest_workers_that_the_file_allows() -> None:
    run = run_of({"train.learning_rate": LR}, top={"scale": {"num_workers": {"min": 2, "max": 16}}})
    assert trial_run(run, {}, "t", "s").world_sizes == [2]


def test_trials_of_one_worker_may_share_a_gpu() -> None:
    half = config.ScaleConfig(gpus_per_worker=0.5)
    assert max_workers(half, True, [{"GPU": 2.0, "CPU": 9.0}]) == 4
    assert max_workers(config.ScaleConfig(), True, [{"GPU": 2.0, "CPU": 9.0}]) == 2
    with pytest.raises(ConfigError, match=re.escape("gpus_per_worker (0.5) needs num_workers 1")):
        run_of({"train.learning_rate": LR}, top={"scale": {"num_workers": 2, "gpus_per_worker": 0.5}})


def test_a_conditional_key_is_set_only_where_its_condition_holds() -> None:
    space = {
        "method.rank": choice(2, 4, when={"method.type": "lora"}),
        "method.alpha": choice(8, 16, when={"method.rank": [4, 8]}),
        "method.type": choice("lora", "full"),
    }
    found = list(grid(section(space, search="grid")))
    assert found == [
        {"method.type": "lora", "method.rank": 2},
        {"method.type": "lora", "method.rank": 4, "method.alpha": 8},
        {"method.type": "lora", "method.rank": 4, "method.alpha": 16},
        {"method.type": "full"},
    ]
    drawn = [sample(section(space), n) for n in range(50)]
    assert {json.dumps(p, sort_keys=True) for p in drawn} == {json.dumps(p, sort_keys=True) for p in found}
    assert list(corners(section(space))) == found


def test_random_values_hang_on_seed_number_and_key_alone_and_stay_in_their_range() -> None:
    more = {"train.warmup": {"type": "uniform", "low": 0.0, "high": 0.5}}
    alone, both = section({"train.learning_rate": LR}), section({**more, "train.learning_rate": LR})
    drawn = [sample(alone, n)["train.learning_rate"] for n in range(300)]
    assert drawn == [sample(both, n)["train.learning_rate"] for n in range(300)]
    assert drawn != [sample(section({"train.learning_rate": LR}, seed=1), n)["train.learning_rate"] for n in range(300)]
    assert 1e-5 <= min(drawn) < 1.2e-5
    assert 0.85e-3 < max(drawn) <= 1e-3
    assert sum(value < 1e-4 for value in drawn) == pytest.approx(150, abs=30), "half of them in each power of ten"
    whole = [
        sample(section({"train.seed": {"type": "randint", "low": 1, "high": 3}}), n)["train.seed"] for n in range(60)
    ]
    assert set(whole) == {1, 2, 3}


def test_a_grid_has_every_point_once_or_the_first_of_them() -> None:
    space = {"train.learning_rate": choice(1e-4, 1e-3), "method.rank": {"type": "randint", "low": 1, "high": 3}}
    whole = section(space, search="grid", num_trials=None)
    assert number_of_trials(whole) == 6
    assert len({json.dumps(p) for p in grid(whole)}) == 6
    assert number_of_trials(section(space, search="grid", num_trials=4)) == 4


def trials_of(*losses: list[float], num_steps: int = 10) -> SweepState:
    """A sweep whose trials reported side by side, step by step."""
    state, at = SweepState({}), 0
    state.trials = [
        TrialRecord(n, {"train.learning_rate": 10.0 ** -(n + 2)}, "done", num_steps) for n in range(len(losses))
    ]
    for place in range(max(map(len, losses))):
        for trial, own in zip(state.trials, losses, strict=True):
            if place < len(own):
                step = (place + 1) * num_steps // max(map(len, losses))
                trial.reports.append(EvalReport(at, step, step / num_steps, own[place], False))
                at += 1
    return state


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_judge_that_is_told_the_past_again_decides_as_the_one_that_lived_it(scheduler: str) -> None:
    tune = section({"train.learning_rate": LR}, scheduler=scheduler, grace=0.2, reduction_factor=2)
    curves = [[3 - quality * step / 10 for step in range(1, 11)] for quality in (0.5, 2.0, 0.1, 1.5, 0.2, 2.5)]

    def play(switch_after: int | None) -> list[tuple[int, int, bool]]:
        state = SweepState({}, [TrialRecord(n, {}, "running", 10) for n in range(len(curves))])
        judge, log = TrialPruner(tune, state), []
        for step in range(1, 11):
            for trial, curve in zip(state.trials, curves, strict=True):
                if trial.status == "stopped":
                    continue
                if len(log) == switch_after:  # the driver died: another judge reads what was kept
                    judge = TrialPruner(tune, state)
                stop = judge.stops(trial.number, step / 10, curve[step - 1])
                trial.reports.append(EvalReport(len(log), step, step / 10, curve[step - 1], stop))
                trial.status = "stopped" if stop else "running"
                log.append((trial.number, step, stop))
        return log

    lived = play(None)
    stopped = {number for number, _, stop in lived if stop}
    assert stopped & {0, 2, 4}
    assert 5 not in stopped, "the best goes on to the end"
    assert min(step for _, step, stop in lived if stop) >= 2, "grace"
    for moment in range(1, len(lived)):
        assert play(moment) == lived


def test_one_that_led_is_given_up_when_better_ones_have_passed_the_same_rungs() -> None:
    judge = TrialPruner(section({"train.learning_rate": LR}, grace=0.1), SweepState({}))
    assert not judge.stops(0, 0.1, 3.0), "the first to come"
    assert not judge.stops(1, 0.1, 2.4)
    assert judge.stops(0, 0.2, 2.9)
    assert not judge.stops(1, 0.2, 1.9)
    assert not judge.stops(2, 0.1, 1.5)
    assert judge.stops(1, 0.3, 1.8), "though nobody else came so far"
    assert not judge.stops(2, 1.0, 1.4)


def test_without_a_scheduler_only_what_is_no_number_is_given_up() -> None:
    judge = TrialPruner(section({"train.learning_rate": LR}, scheduler="none"), SweepState({}))
    assert not any(judge.stops(number, 0.5, float(number)) for number in range(9))
    assert judge.stops(9, 0.5, math.nan)
    assert judge.stops(9, 0.5, math.inf)


def test_nobody_is_given_up_at_the_last_step() -> None:
    judge = TrialPruner(section({"train.learning_rate": LR}, grace=1.0), SweepState({}))
    assert not any(judge.stops(number, 1.0, float(number)) for number in range(9))


def test_state_comes_back_as_it_was_kept_and_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run, place = run_of({"train.learning_rate": LR}), str(tmp_path)
    state = open_state(run, place)
    assert state.trials == []
    state.trials = [
        TrialRecord(0, {"train.learning_rate": 1e-4}, "stopped", 10, [EvalReport(0, 2, 0.2, 2.5, True)]),
        TrialRecord(1, {"train.learning_rate": 3e-4}, "failed", 10, error="no memory"),
    ]
    save_state(state, place)
    assert open_state(run, place) == state
    longer = run_of({"train.learning_rate": LR}, num_trials=20, max_concurrent=3)
    assert open_state(longer, place) == state, "a sweep may be made longer, and wider"
    other = run_of({"train.learning_rate": {**LR, "low": 2e-5}}, top={"train": {"epochs": 3}})
    with pytest.raises(ConfigError) as caught:
        open_state(other, place)
    for part in ("train.epochs (1.0 → 3.0)", "tune.space.train.learning_rate.low (1e-05 → 2e-05)", "another name"):
        assert part in str(caught.value)
    storage.write_bytes(f"{place}/state.json", b"{")
    with pytest.raises(ConfigError, match="is damaged"):
        open_state(run, place)


def test_the_winner_has_the_lowest_loss_of_those_trained_to_the_end() -> None:
    state = trials_of([3, 2.0], [3, 1.5], [3, 1.0], [0.5])
    state.trials[2].status, state.trials[3].status = "stopped", "failed"
    found = state.winner()
    assert found is state.trials[1]
    for trial in state.trials[:2]:
        trial.status = "failed"
    assert state.winner() is state.trials[2], "where none came to the end, of those given up"
    state.trials[2].status = "failed"
    assert state.winner() is None


def quadratic(params: dict[str, Any]) -> float:
    """Best at a learning rate of 1e-4; the warm-up hardly matters."""
    return (math.log10(params["train.learning_rate"]) + 4) ** 2 + 0.01 * float(params.get("train.warmup", 0))


def searched(tune: TuneConfig, number: int) -> list[TrialRecord]:
    trials: list[TrialRecord] = []
    for n in range(number):
        params = propose(tune, trials)
        loss = quadratic(params)
        trials.append(TrialRecord(n, params, "done", 10, [EvalReport(n, 10, 1.0, loss, False)]))
    return trials


def test_optuna_learns_from_the_trials_before_and_a_choice_hangs_on_them_alone() -> None:
    pytest.importorskip("optuna")
    space = {"train.learning_rate": {**LR, "low": 1e-6, "high": 1e-1}, "train.warmup": choice(0.0, 0.1)}
    tune = section(space, search="optuna", num_trials=24)
    trials = searched(tune, 24)
    assert [t.params for t in searched(tune, 24)] == [t.params for t in trials]
    for n in (3, 11, 20):  # what is asked again after the driver died
        assert propose(tune, [TrialRecord(**vars(t)) for t in trials[:n]]) == trials[n].params
    chance = [quadratic(sample(tune, n)) for n in range(24)]
    late = sorted(quadratic(t.params) for t in trials[12:])
    assert late[6] < 0.5 * sorted(chance)[12], "the median of the later half beats that of chance"


def test_optuna_knows_conditions_and_trials_of_every_kind() -> None:
    pytest.importorskip("optuna")
    space = {"method.type": choice("lora", "full"), "method.rank": choice(2, 4, when={"method.type": "lora"})}
    tune = section(space, search="optuna", num_trials=20)
    trials = [
        TrialRecord(0, {"method.type": "lora", "method.rank": 2}, "done", 10, [EvalReport(0, 10, 1.0, 2.0, False)]),
        TrialRecord(1, {"method.type": "full"}, "stopped", 10, [EvalReport(1, 2, 0.2, 3.0, True)]),
        TrialRecord(2, {"method.type": "full"}, "failed", 10, error="x"),
        TrialRecord(3, {"method.type": "lora", "method.rank": 4}, "running", 10),
    ]
    for _ in range(16):
        params = propose(tune, trials)
        assert ("method.rank" in params) == (params["method.type"] == "lora")
        trials.append(TrialRecord(len(trials), params, "running", 10))


def test_importance_names_the_key_that_decided_the_loss_at_a_point_that_all_trials_reached() -> None:
    pytest.importorskip("optuna")
    space = {"train.learning_rate": LR, "train.warmup": {"type": "uniform", "low": 0.0, "high": 0.5}}
    tune, trials = section(space), []
    for n in range(30):
        params = sample(tune, n)
        loss = quadratic(params)
        reports = [EvalReport(2 * n, 2, 0.2, loss, False), EvalReport(2 * n + 1, 10, 1.0, 0.0, False)]
        trials.append(TrialRecord(n, params, "done" if n % 2 else "stopped", 10, reports if n % 2 else reports[:1]))
    found = importance(tune, trials)
    assert found is not None
    assert found[0] == 0.2
    assert found[1]["train.learning_rate"] > 0.8
    assert importance(tune, trials[:3]) is None, "three say nothing"


def test_the_winners_command_makes_the_winners_settings(tmp_path: Path) -> None:
    space = {
        "train.learning_rate": LR,
        "method.target_modules": choice("all-linear", ["q_proj", "v_proj"]),
        "model.revision": choice("true", "v1 x"),
    }
    run = run_of(space, own_data=True)
    (tmp_path / "a b.yaml").write_text(yaml.safe_dump({**BASE, "tune": run.tune.model_dump() if run.tune else None}))
    for modules in ("all-linear", ["q_proj", "v_proj"]):
        for revision in ("true", "v1 x"):
            params = {**sample(section({"train.learning_rate": LR}), 1), "method.target_modules": modules}
            winner = TrialRecord(1, params | {"model.revision": revision}, "done", 10)
            words = shlex.split(command_of(run, winner, str(tmp_path / "a b.yaml")))
            assert words[:2] == ["ftray", "train"]
            again = config.load_run(words[2], words[3:])
            assert again.name == "a-best"
            assert again.config_hash == trial_run(run, winner.params, "t", "s").config_hash


class Page(HTMLParser):
    """Checks that tags close in order; keeps what a test asks."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_every_trial_without_a_request() -> None:
    state = trials_of([3, 2.0, 1.9], [3, 2.5], [3, math.inf])
    state.trials[0].params["method.type"] = "<b>&"
    state.trials[1].params["method.type"] = "lora"
    state.trials.append(TrialRecord(3, {"train.learning_rate": 1e-9}, "failed", 10, error="out of <memory>"))
    winner = state.winner()
    assert winner is not None
    text = render_page("a<b", state, winner, (0.5, {"train.learning_rate": 0.9}), "ftray train 'a b.yaml'")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not {"src", "href"} & {name for _, attributes in page.tags for name in attributes}
    text, scripts = text.split("<script>", 1)
    assert scripts.count("<script>") == 1, "uPlot and the page's own"
    assert not re.search(r"https?:|url\(|<b>&|nan|inf\b", text)
    paths = [attributes for tag, attributes in page.tags if tag == "path"]
    assert len(paths) == 3, "a line for each trial with a loss"
    assert [p.get("class") for p in paths] == [None, None, "best"], "the best on top"
    assert "out of &lt;memory&gt;" in text
    texts = [attributes for tag, attributes in page.tags if tag == "text"]
    assert sum(at.get("x") == "55.0" and at.get("text-anchor") == "end" for at in texts) >= 2, "clear of the lines"
    (chart,) = [json.loads(at["data-chart"] or "") for tag, at in page.tags if tag == "figure"]
    assert (chart["x_title"], chart["y_title"]) == ("share of the steps (%)", "eval loss")
    assert [series["label"].split(":")[0] for series in chart["series"]] == ["trial-002", "trial-001", "trial-000"]
    assert [series["width"] for series in chart["series"]] == [1.5, 1.5, 4], "the best is the thickest"
    assert all(series["values"][-1] is None or series["values"][-1] > 0 for series in chart["series"])
    for coordinate in re.findall(r' (?:x|y|x1|y1|cx|cy|width)="([^"]*)"', text):
        assert -1 <= float(coordinate) <= 721


def test_a_table_has_a_line_for_each_trial_those_that_train_first() -> None:
    state = trials_of([3, 2.0], [3, 1.5], [3])
    state.trials[2].status = "running"
    lines = as_table(state, {2: 7})
    assert [line.split()[0] for line in lines] == ["trial", "trial-002", "trial-001", "trial-000"]
    assert "7/10" in lines[1]
    assert len({line.index("0") for line in lines[1:]}) == 1
    state.trials[2].reports = []
    assert "waiting" in as_table(state)[3]


def test_a_terminal_shows_one_table_and_a_log_none(capsys: pytest.CaptureFixture[str]) -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        console = Console(stream)
        with console.live_lines() as table:
            table.update(["one", "two"])
            console.say("a line")
            table.update(["one", "three"])
        text = stream.getvalue()
        assert ("three" in text) == shown
        assert "a line" in text
        if shown:
            assert screen(text.split("three")[0])[:2] == ["a line", "one"], "the table is drawn again below the line"
            assert screen(text) == ["a line"], "and removed at the end"


def test_what_must_not_change_in_a_sweep_is_all_that_decides_it() -> None:
    settings = settings_of(run_of({"train.learning_rate": LR}))
    assert {"model", "method", "data", "train", "deepspeed", "evaluate", "tune"} == settings.keys()
    assert {"num_trials", "max_concurrent"} & settings["tune"].keys() == set()
    assert json.loads(json.dumps(settings)) == settings
