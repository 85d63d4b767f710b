"""The driver's side of `ftray serve`: starts the endpoint, waits for signals, drains.

Knows nothing of requests, models or torch. The caller has connected to Ray, or connects after `check_endpoint`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftray import config, storage
from ftray.errors import ConfigError, FtrayError, RunError
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.auth import read_key_hashes
from ftray.serve.model_files import check_model, is_hub_id
from ftray.signals import stop_event

logger = logging.getLogger(__name__)
_APP = "ftray"
START_TRIES = 3


@dataclass
class Endpoint:
    """A running endpoint. `url` ends in /v1, as OpenAI clients expect of base_url."""

    url: str
    model_id: str
    port: int

    def stop(self) -> None:
        """Drains, then stops Serve: deleting the application lets streams end, `serve.shutdown` would cut them."""
        from ray import serve

        serve.delete(_APP)
        serve.shutdown()


def check_endpoint(model_dir: str | Path, serve_cfg: config.ServeConfig) -> tuple[str, ...]:
    """Checks everything that can be known before Ray starts. Returns the hashed API keys.

    Raises:
        ConfigError: There is no key on an open host, or the port is taken.
        ModelError: The directory is not a model.
    """
    key_hashes = read_key_hashes(serve_cfg.host)
    check_model(str(model_dir))
    _find_port(serve_cfg.host, serve_cfg.port)
    return key_hashes


def start_endpoint(
    model_dir: str | Path,
    served: ServedModels,
    serve_cfg: config.ServeConfig,
    *,
    name: str | None = None,
    warn: Callable[[str], None] = logger.warning,
    **replica: Any,
) -> Endpoint:
    """Starts Serve on this Ray cluster and waits until a replica is healthy.

    Args:
        model_dir: The model.
        served: Models and adapters.
        serve_cfg: The section `serve`.
        name: The model name that the caller reports to the user. Default: the first of `served`.
        warn: Called if Serve has to be started again.
        replica: Other arguments of `build_app`.

    Raises:
        ConfigError: As `check_endpoint`, or this cluster already serves an endpoint.
        ModelError: As `check_endpoint`.
        RunError: No replica becomes healthy.
    """
    key_hashes = check_endpoint(model_dir, serve_cfg)
    port = _find_port(serve_cfg.host, serve_cfg.port)
    from ray import serve

    from ftray.serve.app import QUIET, build_app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        raise ConfigError("this Ray cluster already serves an endpoint; stop it, or use another cluster")
    model_id = name or served.model_id
    # replicas have another working directory
    directory = str(model_dir) if is_hub_id(str(model_dir)) else storage.absolute(str(model_dir))
    app = build_app(directory, served, serve_cfg, key_hashes=key_hashes, **replica)
    _start_serve(_http(serve_cfg, port), QUIET, warn)
    try:
        serve.run(app, name=_APP, route_prefix="/")
    except RuntimeError as err:
        reason = _failure() or str(err)
        serve.shutdown()
        raise RunError(f"the endpoint for {model_id} did not start: {reason}") from err
    host = "127.0.0.1" if serve_cfg.host in ("0.0.0.0", "::") else serve_cfg.host  # nosec B104 # compared, not bound
    host = f"[{host}]" if ":" in host else host
    return Endpoint(f"http://{host}:{port}/v1", model_id, port)


def _start_serve(http: dict[str, Any], logging_config: Any, warn: Callable[[str], None]) -> None:
    """Starts Serve, and retries because its controller and proxy may time out on a busy machine. Raises RunError."""
    from ray import serve

    for attempt in range(1, START_TRIES + 1):
        try:
            serve.start(proxy_location="HeadOnly", http_options=http, logging_config=logging_config)
            return
        except FtrayError:  # a signal that came meanwhile
            raise
        except Exception as err:  # noqa: BLE001 - time-outs come as several kinds of errors
            reason = " ".join(str(err).split())[:200] or type(err).__name__
        with suppress(Exception):
            serve.shutdown()
        if attempt == START_TRIES:
            raise RunError(
                f"Ray Serve did not start in {START_TRIES} tries ({reason}); its logs are in /tmp/ray/session_latest/logs/serve. "
                "When the machine has CPU and memory to spare, run the same command again to continue"
            )
        warn(f"Ray Serve did not start ({reason}); trying again ({attempt + 1} of {START_TRIES})")


def serve_config(model_dir: str, served: ServedModels, serve_cfg: config.ServeConfig, **replica: Any) -> dict[str, Any]:
    """The same endpoint as a config for `serve deploy` and RayService. API keys stay in the cluster's environment."""
    arguments = {
        "model_dir": model_dir,
        "served": asdict(served),
        "serve": serve_cfg.model_dump(mode="json", exclude_defaults=True),
        **replica,
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": _http(serve_cfg, serve_cfg.port),
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {"name": _APP, "route_prefix": "/", "import_path": "ftray.serve.app:build", "args": arguments}
        ],
    }


def _http(serve_cfg: config.ServeConfig, port: int) -> dict[str, Any]:
    return {"host": serve_cfg.host, "port": port, "request_timeout_s": serve_cfg.proxy_timeout_s}


def run_until_signal(endpoint: Endpoint, look: Callable[[], None] = lambda: None) -> None:
    """Stays up until SIGTERM, SIGHUP or SIGINT, then drains. A second signal cuts what still runs. Main thread only.

    look: called twice a second.
    """
    with stop_event() as event:
        while not event.wait(timeout=0.5):  # in steps, so that Python can run signal handlers
            look()
        try:
            endpoint.stop()
        except KeyboardInterrupt:
            from ray import serve

            serve.shutdown()


def _find_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Serve binds with SO_REUSEPORT and would silently share a port that is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection would block the port
            sock.bind((host, port))
            return int(sock.getsockname()[1])
    except OSError as err:
        raise ConfigError(
            f"serve.host {host} and port {port} cannot be used ({err.strerror or err}); "
            "set another serve.port, or 0 for any free port"
        ) from None


def _failure() -> str:
    """The replicas' error message."""
    from ray import serve

    messages: list[str] = [d.message for app in serve.status().applications.values() for d in app.deployments.values()]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or [""])[-1]
