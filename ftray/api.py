"""Python API: what the commands do, for notebooks and scripts.

import ftray

run = ftray.train("tickets.yaml", "train.epochs=1")
run.evaluate()
run.export()
run.chat([{"role": "user", "content": "My parcel is late."}])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ftray import config, storage
from ftray.cli.context import finished, launch, open_target, owned, reported
from ftray.config import RunConfig
from ftray.console import Console
from ftray.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from ftray.evaluate.results import Comparison
    from ftray.report.plan import RunPlan
    from ftray.train.checkpoint.catalog import CheckpointRef

__all__ = ["Run", "load_config", "plan"]


def load_config(path: str, *overrides: str) -> RunConfig:
    """Reads a run file, or the settings of an existing run.

    Args:
        path: A .yaml file, or the directory of a run (local or s3://).
        overrides: `key=value`, as on the command line.

    Raises:
        ConfigError: The file is missing or invalid; the message names key, value and remedy.
    """
    return open_target(path, list(overrides))


def plan(source: str | RunConfig, *overrides: str, card: str | None = None) -> RunPlan:
    """Estimates memory, time and cost of a run without starting it.

    Args:
        source: A run file, the directory of a run, or a config.
        overrides: `key=value`.
        card: GPU to plan for, such as `H100`. Default: `scale.accelerator`.

    Raises:
        ConfigError: The run is invalid, or the card is unknown.
    """
    from ftray.report.plan import make_plan

    run = _config_of(source, overrides)
    return make_plan(run, storage.absolute(run.directory), card, None)


class Run:
    """A run on disk: its settings, metrics, checkpoints and model.

    Args:
        directory: The run's directory, local or s3://.

    Raises:
        ConfigError: There is no run.
    """

    def __init__(self, directory: str) -> None:
        self.directory = storage.absolute(directory)
        self.config = open_target(self.directory)

    def __repr__(self) -> str:
        return f"Run({self.directory!r})"

    @property
    def metrics(self) -> pd.DataFrame:
        """A row for each committed step, indexed by step: loss, learning rate, tokens per second and others."""
        import pandas as pd

        from ftray.train.checkpoint.catalog import read_metrics

        frame = pd.DataFrame(read_metrics(self.directory))
        return frame.set_index("step") if "step" in frame else frame

    @property
    def checkpoints(self) -> list[CheckpointRef]:
        """Committed checkpoints, the newest first."""
        from ftray.train.checkpoint.catalog import list_checkpoints

        return list_checkpoints(self.directory)

    @property
    def comparison(self) -> Comparison | None:
        """The last comparison with the base, or None."""
        from ftray.evaluate.results import read_results

        return read_results(self.directory)

    @classmethod
    def train(cls, source: str | RunConfig, *overrides: str) -> Run:
        """Trains a run to its end, or continues it at its newest checkpoint. Starts a local Ray unless RAY_ADDRESS is set.

        Args:
            source: A run file, the directory of a run, or a config.
            overrides: `key=value`, as on the command line.

        Raises:
            ConfigError, DataError, ModelError: Before any worker starts.
            RunError: Workers failed more often than allowed.
        """
        from ftray.events.trackers import check_trackers

        run = _config_of(source, overrides)
        if finished(run, verify=True) is None:
            check_trackers(run)
            console = Console()
            with owned(run, console) as (run_dir, lease), reported(run, run_dir, console, lease):
                launch(run, run_dir, console, lease)
        return cls(run.directory)

    def evaluate(self, step: int | None = None) -> Comparison:
        """Compares the tuned model with its base on the eval data. step: of the checkpoint. Default: the best one.

        Raises:
            ConfigError: There is no eval data or no checkpoint.
        """
        from ftray.driver.preflight import check_evaluation

        check_evaluation(self.config, self.directory, step)
        console = Console()
        with owned(self.config, console) as (run_dir, lease):
            from ftray.evaluate.run import compare

            with reported(self.config, run_dir, console, lease):
                comparison, _ = compare(self.config, run_dir, console, step)
        return comparison

    def export(self, step: int | None = None) -> str:
        """Writes the adapter and the merged model; returns the directory of the whole model.

        Raises:
            ConfigError: There is no checkpoint.
        """
        self.__dict__.pop("_model", None)
        console = Console()
        with owned(self.config, console, with_ray=False) as (run_dir, _):
            from ftray.report.model_card import described
            from ftray.train.export import export

            return export(self.config, run_dir, console, partial(described, self.config, run_dir), step)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """The exported model's answer to a conversation in OpenAI's format. temperature: 0 is greedy.

        Raises:
            ConfigError: The run has no exported model.
            DataError: The conversation is not valid, or too long for the model.
        """
        from ftray.chat import ChatFormat, Conversation, read_messages
        from ftray.engine.batch import generate_all
        from ftray.engine.protocol import SamplingParams

        model, tokenizer = self._model
        ids = ChatFormat(tokenizer).encode_prompt(Conversation(tuple(read_messages(list(messages)))))
        params = SamplingParams(max_tokens, temperature=temperature, seed=seed)
        with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop of its own
            (answer,) = thread.submit(generate_all, model, tokenizer, [ids], params).result()
        return answer.text

    def generate(self, prompt: str, max_tokens: int = 256, temperature: float = 0.0, seed: int | None = None) -> str:
        """The answer to one question; see `chat`."""
        return self.chat([{"role": "user", "content": prompt}], max_tokens, temperature, seed)

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        """The exported model, merged, and its tokenizer."""
        from ftray.engine.batch import load_model

        whole = storage.join(self.directory, "model" if self.config.method.type == "full" else "model/merged")
        if storage.is_remote(whole):
            raise ConfigError(
                f"{whole} is not on this machine; copy it here, or serve it: ftray serve {self.directory}"
            )
        if not storage.exists(storage.join(whole, "config.json")):
            raise ConfigError(f"{self.directory} has no exported model; call export() first")
        return load_model(whole)


def _config_of(source: str | RunConfig, overrides: Sequence[str]) -> RunConfig:
    if isinstance(source, str):
        return load_config(source, *overrides)
    if not overrides:
        return source
    from ftray.config.loader import apply_override

    tree = source.model_dump(mode="json")
    for text in overrides:
        apply_override(tree, text)
    return config.parse_run(tree, "the config")
