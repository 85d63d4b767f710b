"""Every knob of a run: the run file's schema, its YAML, its overrides, and what follows from it by arithmetic.

Knows nothing of Ray, torch, data or storage; importing it costs pydantic and a YAML parser. Validators only raise;
what can be derived is a property. A run file is `load_run(path, overrides)`; every error is one ConfigError that names
the key, the value and the remedy.
"""

from ftray.config.after import Canary, Evaluate, Feedback, Serve
from ftray.config.base import Section
from ftray.config.data import Clean, Data, Source, Split
from ftray.config.gates import FIGURES, Gate
from ftray.config.observe import Observe
from ftray.config.opinions import Human, Judge
from ftray.config.run import Run, differing_keys, load_run, parse_run
from ftray.config.training import CheckpointSection, DeepSpeed, Method, Model, Scale, Train
from ftray.config.tune import Parameter, Tune

__all__ = [
    "FIGURES",
    "Canary",
    "CheckpointSection",
    "Clean",
    "Data",
    "DeepSpeed",
    "Evaluate",
    "Feedback",
    "Gate",
    "Human",
    "Judge",
    "Method",
    "Model",
    "Observe",
    "Parameter",
    "Run",
    "Scale",
    "Section",
    "Serve",
    "Source",
    "Split",
    "Train",
    "Tune",
    "differing_keys",
    "load_run",
    "parse_run",
]
