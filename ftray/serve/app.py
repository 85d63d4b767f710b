"""The Ray Serve application: one deployment, whose replicas each hold a whole model and their own ASGI app.

Knows nothing of training, of HTTP's details (api) or of how a cluster or a terminal is handled (run). Torch and
transformers are imported in the replica only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from ftray import config

MAX_ANSWER_S = 600.0
_DRAIN_S = MAX_ANSWER_S + 30  # a replica that goes away waits for its longest answer

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica is told. API keys come hashed."""

    model_dir: str
    model_id: str
    max_tokens: int
    max_num_seqs: int
    max_context: int | None
    dtype: str | None
    num_threads: int
    key_hashes: tuple[str, ...]


@serve.ingress()
class ModelReplica:
    """Loads the model, then builds its app around it: engines hold threads and can't be sent from the driver."""

    def __init__(self, settings: ReplicaSettings) -> None:
        from ftray.engine.offline import load_engine
        from ftray.serve.models import local_model

        self._settings = settings
        self._engine = load_engine(
            local_model(settings.model_dir),
            name=settings.model_id,
            dtype=settings.dtype,
            num_threads=settings.num_threads,
            max_num_seqs=settings.max_num_seqs,
            max_context=settings.max_context,
        )

    def __serve_build_asgi_app__(self) -> Any:
        from ftray.serve.api import build_api

        return build_api(
            self._engine,
            self._settings.model_id,
            max_tokens=self._settings.max_tokens,
            key_hashes=self._settings.key_hashes,
            max_answer_s=MAX_ANSWER_S,
        )

    async def check_health(self) -> None:
        """Asked by Serve: a replica whose engine died is replaced."""
        self._engine.health()


def build_app(
    model_dir: str,
    model_id: str,
    serve_cfg: config.Serve,
    *,
    key_hashes: tuple[str, ...] = (),
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    dtype: str | None = None,
    max_context: int | None = None,
) -> serve.Application:
    """A Serve application for one model directory, known to clients as `model_id`.

    num_cpus, num_gpus: a replica's; torch gets as many threads. A replica answers up to 1.5 × target_ongoing_requests
    at once, so that autoscaling sees load above its target before requests have to wait.
    """
    max_ongoing = math.ceil(1.5 * serve_cfg.target_ongoing_requests)
    deployment = serve.deployment(
        ModelReplica,
        name="model",
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=serve_cfg.min_replicas,
            max_replicas=serve_cfg.max_replicas,
            target_ongoing_requests=serve_cfg.target_ongoing_requests,
        ),
        max_ongoing_requests=max_ongoing,
        max_queued_requests=max(1, serve_cfg.max_queued_requests),  # Serve knows no 0
        backpressure_config=BackpressureConfig(retry_after_s=1),
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        max_constructor_retry_count=2,  # a model that doesn't load won't load the twentieth time
        logging_config=QUIET,
    )
    return deployment.bind(
        ReplicaSettings(
            model_dir=model_dir,
            model_id=model_id,
            max_tokens=serve_cfg.max_tokens,
            max_num_seqs=max_ongoing,
            max_context=max_context,
            dtype=dtype,
            num_threads=max(1, int(num_cpus)),
            key_hashes=key_hashes,
        )
    )
