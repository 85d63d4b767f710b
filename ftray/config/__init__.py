"""Every knob of a run: the run file's schema, its YAML, its overrides, and what follows from it by arithmetic.

Knows nothing of Ray, torch, data or storage; importing it costs pydantic and a YAML parser. Validators only raise;
what can be derived is a property. A run file is `load_run(path, overrides)`; every error is one ConfigError that names
the key, the value and the remedy.
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
