"""The run file: schema, YAML, overrides and derived values.

`load_run(path, overrides)` reads a run file. Every error is a ConfigError that names the key, the value and the remedy.
Validators only raise; derived values are properties. The package imports pydantic and a YAML parser, but no Ray, torch,
data or storage.
"""

from ftray.config.base import Section
from ftray.config.data import CleanConfig, DataConfig, SourceConfig, SplitConfig
from ftray.config.evaluate import FIGURES, EvaluateConfig, Gate, HumanEvalConfig, JudgeConfig
from ftray.config.method import MethodConfig
from ftray.config.model import ModelConfig
from ftray.config.parallel import ScaleConfig
from ftray.config.run import RunConfig, differing_keys, load_run, parse_run
from ftray.config.serve import CanaryConfig, FeedbackConfig, ServeConfig
from ftray.config.tracking import TrackingConfig
from ftray.config.train import CheckpointConfig, DeepSpeedConfig, TrainConfig
from ftray.config.tune import TuneConfig, TuneParameter

__all__ = [
    "FIGURES",
    "CanaryConfig",
    "CheckpointConfig",
    "CleanConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "EvaluateConfig",
    "FeedbackConfig",
    "Gate",
    "HumanEvalConfig",
    "JudgeConfig",
    "MethodConfig",
    "ModelConfig",
    "RunConfig",
    "ScaleConfig",
    "Section",
    "ServeConfig",
    "SourceConfig",
    "SplitConfig",
    "TrackingConfig",
    "TrainConfig",
    "TuneConfig",
    "TuneParameter",
    "differing_keys",
    "load_run",
    "parse_run",
]
