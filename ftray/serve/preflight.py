"""Checks before training that the endpoint's engine is installed and can serve the run's result.

Plain Python: it imports neither torch nor vLLM and loads nothing. The engine itself reports what only a start can show.
"""

from __future__ import annotations

import importlib.util

from ftray import config
from ftray.errors import ConfigError


def check_installed(serve_cfg: config.ServeConfig) -> None:
    """Raises ConfigError if the engine is not installed here. For an endpoint that this machine will start."""
    if serve_cfg.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "serve.engine is vllm, which is not installed here: pip install 'ftray[vllm]', or set serve.engine: transformers"
        )


def check_holds(run: config.RunConfig) -> None:
    """Raises ConfigError for a run whose adapter this engine cannot serve on any machine."""
    method, cfg = run.method, run.serve
    if cfg.engine != "vllm" or method.type not in ("lora", "qlora") or not cfg.max_adapters:
        return
    from ftray.engine.adapters import VLLM_MAX_RANK  # keeps `ftray check` fast

    instead = "set serve.max_adapters: 0 (merged weights), or serve.engine: transformers"
    if method.dora:
        raise ConfigError(f"serve.engine is vllm, which serves no adapters with method.dora; {instead}")
    if method.rank > VLLM_MAX_RANK:
        raise ConfigError(
            f"serve.engine is vllm, which serves adapters up to rank {VLLM_MAX_RANK}, and method.rank is {method.rank}; "
            f"{instead}"
        )
