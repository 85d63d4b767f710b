"""The Ray Serve application: one deployment, whose replicas each have a whole model and their own ASGI app.

Knows nothing of training, HTTP (`routes`), clusters or terminals (`run`). Torch and transformers are imported in replicas
only.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from ftray import config
from ftray.engine.protocol import Engine
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.auth import read_key_hashes
from ftray.serve.autoscaling import METRIC, TtftPolicy, TtftWindow
from ftray.serve.metrics import ServeMetrics
from ftray.serve.model_files import is_hub_id
from ftray.serve.ray_metrics import RayMetricsMirror

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
MAX_BACKOFF_S = 0.02  # of the router; the longest time that a slot is idle while a request waits
_MORE_S = 30  # time of a shutdown beyond the longest answer


@dataclass(frozen=True)
class ReplicaSettings:
    """The arguments of a replica.

    Attributes:
        model_dir: A directory, a committed directory in a bucket, or a hub id.
        key_hashes: SHA-256 hashes of the API keys.
        place: URI below which feedback and events are stored.
    """

    model_dir: str
    served: ServedModels
    serve_cfg: config.ServeConfig
    max_num_seqs: int
    max_context: int | None
    dtype: str | None
    num_threads: int
    key_hashes: tuple[str, ...]
    place: str | None


@serve.ingress()
class ModelReplica:
    """Loads the model, then builds its app around it: engines have threads and cannot be sent from the driver."""

    def __init__(self, settings: ReplicaSettings) -> None:
        from ftray.serve.model_files import local_model

        self._settings, served, cfg = settings, settings.served, settings.serve_cfg
        self._first_times, self._metrics = TtftWindow(), ServeMetrics()
        self._exporter: RayMetricsMirror | None = None
        options: dict[str, Any] = {
            "name": served.model_id,
            "dtype": settings.dtype,
            "max_num_seqs": settings.max_num_seqs,
            "max_context": settings.max_context,
            "revision": served.revision,
        }
        directory = settings.model_dir if is_hub_id(settings.model_dir) else local_model(settings.model_dir)
        has_adapters = bool(served.adapters or served.registry)
        self._engine: Engine
        if cfg.engine == "vllm":
            from ftray.engine.vllm.engine import VllmEngine

            most = max(1, served.max_adapters) if has_adapters else 0
            options |= {"max_adapters": most, "tensor_parallel": cfg.tensor_parallel}
            self._engine = VllmEngine(directory, **options)
        else:
            from ftray.engine.batch import load_engine

            self._engine = load_engine(directory, num_threads=settings.num_threads, adapters=has_adapters, **options)

    def __serve_build_asgi_app__(self) -> Any:
        from ftray.serve.rate_limit import RateLimits
        from ftray.serve.routes import build_api
        from ftray.serve.routing import Router

        settings, cfg = self._settings, self._settings.serve_cfg
        served = replace(
            settings.served,
            trusted_keys=tuple(cfg.trusted_keys),
            max_adapter_bytes=cfg.max_adapter_mb * 1_000_000,
        )
        return build_api(
            self._engine,
            served,
            max_tokens=cfg.max_tokens,
            key_hashes=settings.key_hashes,
            max_answer_s=cfg.max_answer_s,
            limits=RateLimits(cfg.requests_per_minute, cfg.tokens_per_minute, cfg.tokens_per_day),
            router=Router(cfg.ab, cfg.canary, settings.place),
            place=settings.place,
            feedback=cfg.feedback,
            first_times=self._first_times,
            metrics=self._metrics,
            cors_origins=cfg.cors_origins,
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for autoscaling policies."""
        return {METRIC: self._first_times.median()}

    async def check_health(self) -> None:
        """Called by Serve every few seconds. A replica with a dead engine is replaced."""
        self._engine.health()
        if self._exporter is None:
            self._exporter = RayMetricsMirror(self._metrics, serve.get_replica_context().replica_id.unique_id)
        await asyncio.to_thread(self._exporter.copy)  # thousands of series take longer than the time of one token


def deployment_options(serve_cfg: config.ServeConfig, num_cpus: float = 1.0, num_gpus: float = 0.0) -> dict[str, Any]:
    """Serve's options for the deployment: number of replicas, their limits, and how they shut down.

    A replica answers up to 1.5 × target_ongoing_requests at the same time, so autoscaling sees a load above its target before
    requests have to wait.
    """
    return {
        "ray_actor_options": {"num_cpus": num_cpus, "num_gpus": num_gpus},
        "autoscaling_config": _autoscaling(serve_cfg),
        "max_ongoing_requests": math.ceil(1.5 * serve_cfg.target_ongoing_requests),
        "max_queued_requests": max(1, serve_cfg.max_queued_requests),  # Serve does not accept 0
        "backpressure_config": BackpressureConfig(retry_after_s=1),
        # While all replicas are full, the router looks again after this time. Serve's default grows to 0.5 s, for which a
        # slot stays idle although requests wait.
        "request_router_config": RequestRouterConfig(initial_backoff_s=0.01, max_backoff_s=MAX_BACKOFF_S),
        "graceful_shutdown_timeout_s": serve_cfg.max_answer_s + _MORE_S,  # the longest answer may end
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
        "max_constructor_retry_count": 2,  # Serve's default of 20 tries would not help a model that does not load
        "logging_config": QUIET,
    }


def _autoscaling(serve_cfg: config.ServeConfig) -> AutoscalingConfig:
    options: dict[str, Any] = {}
    if serve_cfg.target_first_token_s is not None:
        kwargs = {"target_s": serve_cfg.target_first_token_s}
        options["policy"] = AutoscalingPolicy(policy_function=TtftPolicy, policy_kwargs=kwargs)
    return AutoscalingConfig(
        min_replicas=serve_cfg.min_replicas,
        initial_replicas=max(1, serve_cfg.min_replicas),  # shows at the start whether the model loads
        max_replicas=serve_cfg.max_replicas,
        target_ongoing_requests=serve_cfg.target_ongoing_requests,
        upscale_delay_s=serve_cfg.upscale_delay_s,
        downscale_delay_s=serve_cfg.downscale_delay_s,
        # A longer window would react later; replicas report to Serve every 10 s.
        look_back_period_s=min(30.0, max(11.0, serve_cfg.upscale_delay_s)),
        **options,
    )


def build_app(
    model_dir: str,
    served: ServedModels,
    serve_cfg: config.ServeConfig,
    *,
    key_hashes: tuple[str, ...] = (),
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    dtype: str | None = None,
    max_context: int | None = None,
    place: str | None = None,
) -> serve.Application:
    """A Serve application for one model, or one base with its adapters.

    Args:
        num_cpus: CPUs of a replica. Torch gets as many threads.
        num_gpus: GPUs of a replica.
        place: URI below which feedback and events are stored.
    """
    options = deployment_options(serve_cfg, num_cpus, num_gpus)
    deployment = serve.deployment(ModelReplica, name="model", **options)
    return deployment.bind(
        ReplicaSettings(
            model_dir=model_dir,
            served=served,
            serve_cfg=serve_cfg,
            max_num_seqs=options["max_ongoing_requests"],
            max_context=max_context,
            dtype=dtype,
            num_threads=max(1, int(num_cpus)),
            key_hashes=key_hashes,
            place=place,
        )
    )


def build(arguments: dict[str, Any]) -> serve.Application:
    """The `import_path` of a Serve config. The arguments are those that `serve_config` wrote.

    API keys come from the cluster's environment, never from the config. Raises ConfigError as `read_key_hashes`.
    """
    options = dict(arguments)
    serve_cfg = config.ServeConfig.model_validate(options.pop("serve"))
    served = ServedModels(**options.pop("served"))
    return build_app(options.pop("model_dir"), served, serve_cfg, key_hashes=read_key_hashes(serve_cfg.host), **options)
