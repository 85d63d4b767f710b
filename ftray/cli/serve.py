"""The command `serve`. It looks up checkpoints and adapters for the package `serve`, which knows no runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ftray import config
from ftray.cli.context import RunTarget, command, open_target
from ftray.console import Console
from ftray.errors import CheckpointError, ConfigError, ModelError

if TYPE_CHECKING:
    from ftray.serve.adapter_cache import ServedModels

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _base_of(run: config.RunConfig) -> config.ModelConfig:
    """The base with an absolute path, so that runs on the same base agree."""
    from ftray.model.load import absolute_base

    return absolute_base(run.model)


@command(is_work=True, starts_ray=True)
def serve(
    target: RunTarget,
    overrides: Annotated[
        list[str] | None,
        Argument(
            metavar="RUN|KEY=VALUE",
            help="More runs or adapter directories of the same base, and overrides such as serve.port=9000.",
            show_default=False,
        ),
    ] = None,
    print_config: Annotated[
        bool, Option("--config", help="Print the config for `serve deploy` and RayService instead.")
    ] = False,
    *,
    console: Console,
) -> int:
    """Serve the base model, the run's adapter and all published adapters behind an OpenAI-compatible endpoint, until Ctrl-C."""
    from ftray import storage
    from ftray.cli.session import quiet, ray_session
    from ftray.serve import proxy
    from ftray.serve.run import check_endpoint, run_until_signal, serve_config, start_endpoint

    words = overrides or []
    run = open_target(target, [word for word in words if "=" in word])
    _check_servable(run, is_local=not print_config)
    model_dir, served = _what_to_serve(run, [word for word in words if "=" not in word])
    served = replace(served, references=_references(run, served))
    replica: dict[str, Any] = {
        "place": storage.absolute(run.directory),
        "dtype": _DTYPES[run.train.precision],
        "num_gpus": float(run.serve.tensor_parallel if run.scale.accelerator else 0),
    }
    _check_shares(run.serve, served)
    if print_config:
        import yaml

        console.say(yaml.safe_dump(serve_config(model_dir, served, run.serve, **replica), sort_keys=False).rstrip())
        return 0
    say_step(run, target, console)
    check_endpoint(model_dir, run.serve)
    proxy.announce()
    with quiet(run.name, console), ray_session(run.serve.max_replicas * run.scale.cpus_per_worker):
        replica["num_gpus"] = _gpus_for(run, replica["num_gpus"], console)
        endpoint = start_endpoint(model_dir, served, run.serve, name=run.name, warn=console.warn, **replica)
        console.say(f"serving {run.name} at {endpoint.url}  (Ctrl-C drains and stops)\n{_curl(endpoint.url, run.name)}")
        if served.registry:
            page = endpoint.url.removesuffix("v1")
            console.say(f"side by side: {page}  new adapters published for {served.model_id} appear automatically")
        run_until_signal(endpoint, _canary_watch(run, console))
    return 0


def _check_servable(run: config.RunConfig, *, is_local: bool) -> None:
    """Raises ConfigError if the run can't be served. is_local: on this machine, so its packages and API keys count."""
    from ftray import storage
    from ftray.serve.auth import read_key_hashes
    from ftray.serve.preflight import check_holds, check_installed

    if run.method.type == "prompt-tuning":
        model_dir = storage.join(storage.absolute(run.directory), "model")
        raise ConfigError(
            f"method.type prompt-tuning can't be served, because virtual tokens are not model weights; load the adapter in "
            f"{model_dir} with PEFT, or train with lora"
        )
    check_holds(run)
    if is_local:
        check_installed(run.serve)
        read_key_hashes(run.serve.host)  # authentication is checked first


def _references(run: config.RunConfig, served: ServedModels) -> dict[str, Any]:
    """The drift baselines of the served models, by name."""
    from ftray import storage
    from ftray.serve.model_files import reference_of

    run_dirs = {run.name: storage.absolute(run.directory)}
    run_dirs |= {name: uri.rpartition("/")[0] for name, uri in served.adapters.items()}
    return {name: reference for name, run_dir in run_dirs.items() if (reference := reference_of(run_dir))}


def say_step(run: config.RunConfig, target: str, console: Console) -> None:
    """Warns if the exported model is not the run's best checkpoint, or that checkpoint is damaged.

    Raises ModelError for an export whose manifest is damaged.
    """
    from ftray import storage
    from ftray.train.checkpoint.catalog import best_checkpoint

    run_dir = storage.absolute(run.directory)
    place = storage.join(run_dir, "model")
    try:
        manifest = storage.read_manifest(place)
    except CheckpointError:
        raise ModelError(
            f"{storage.join(place, storage.MANIFEST)} is damaged; export the model again: ftray export {target}"
        ) from None
    step = manifest["meta"].get("step") if manifest else None
    if step is None:  # not an export of this run
        return
    try:
        best = best_checkpoint(run_dir).step
    except ConfigError:  # the checkpoints are gone
        return
    except CheckpointError as err:
        console.warn(f"the served model is from step {step}; {err}")
        return
    if step != best:
        console.warn(
            f"the served model is from step {step}, but the run's best checkpoint is step {best}; to serve that one: "
            f"ftray export {target}"
        )


def _gpus_for(run: config.RunConfig, wanted: float, console: Console) -> float:
    """GPUs of a replica: 0 on a machine without GPUs, if the engine allows it.

    Raises:
        ConfigError: The cluster has too few GPUs; Ray Serve would wait forever.
    """
    import ray

    available, needed = ray.cluster_resources().get("GPU", 0.0), wanted * max(1, run.serve.min_replicas)
    if available >= needed:
        return wanted
    if available == 0 and run.serve.engine == "transformers":
        console.warn(f"scale.accelerator is {run.scale.accelerator}, but this machine has no GPU; serving on the CPU")
        return 0.0
    raise ConfigError(
        f"{max(1, run.serve.min_replicas)} replicas (serve.min_replicas) of {wanted:g} GPUs need {needed:g} GPUs, "
        f"the cluster has {available:g}; lower serve.min_replicas or serve.tensor_parallel, or use a larger cluster"
    )


def _what_to_serve(run: config.RunConfig, more: list[str]) -> tuple[str, ServedModels]:
    """The model directory or hub id, and the names of the served models."""
    from ftray import storage
    from ftray.model.load import resolve_base
    from ftray.serve.adapter_cache import ServedModels
    from ftray.serve.model_files import check_model, lineages_of
    from ftray.serve.registry import base_name, registry_of

    run_dir = storage.absolute(run.directory)
    whole = storage.join(run_dir, *(("model",) if run.method.type == "full" else ("model", "merged")))
    check_model(whole)
    if run.method.type == "full" or not run.serve.max_adapters:
        if more:
            reason = "serve.max_adapters is 0" if run.method.type != "full" else "its method.type is full"
            raise ConfigError(f"{more[0]} can't be served beside '{run.name}': {reason}; serve runs that are adapters")
        return whole, ServedModels(run.name, lineages=lineages_of({run.name: storage.join(run_dir, "model")}))
    base = _base_of(run)
    adapters = {run.name: storage.join(run_dir, "model")}
    for word in more:
        name, uri = _adapter_of(word, base)
        if name in adapters:
            raise ConfigError(f"two served models are called {name}; rename one run, or publish it under another name")
        adapters[name] = uri
    if (model_id := base_name(base.base)) in adapters:
        model_id = f"{model_id}-base"
    place, most = registry_of(run.storage, base.base), run.serve.max_adapters
    served = ServedModels(model_id, adapters, place, base.base, base.revision, most, lineages=lineages_of(adapters))
    return resolve_base(run.model), served


def _adapter_of(word: str, base: config.ModelConfig) -> tuple[str, str]:
    """Name and URI of an adapter, from another run or an adapter directory."""
    from ftray import storage
    from ftray.engine.adapters import CONFIG_FILE
    from ftray.serve.registry import check_name

    uri = storage.absolute(word)
    if storage.exists(storage.join(uri, CONFIG_FILE)):
        return check_name(Path(uri).name), uri
    other = open_target(word, [])
    other_base = _base_of(other)
    if (other_base.base, other_base.revision) != (base.base, base.revision):
        raise ConfigError(
            f"{word} was trained on {other_base.base}, not on {base.base}; only adapters of the same base can be served together"
        )
    uri = storage.join(storage.absolute(other.directory), "model")
    if other.method.type not in ("lora", "qlora") or not storage.exists(storage.join(uri, CONFIG_FILE)):
        raise ConfigError(f"{uri} holds no LoRA adapter; export it first: ftray export {word}")
    return other.name, uri


def _check_shares(serve_cfg: config.ServeConfig, served: ServedModels) -> None:
    """Raises ConfigError if serve.ab names an unknown model."""
    if not serve_cfg.ab:
        return
    from ftray.serve.registry import list_published

    published = list_published(served.registry, serve_cfg.trusted_keys) if served.registry else {}
    models = [served.model_id, *served.adapters, *(f"{served.model_id}:{name}" for name in published)]
    if missing := [model for model in serve_cfg.ab if model not in models]:
        raise ConfigError(f"serve.ab names {missing[0]}, which is not served; use one of {', '.join(models)}")


def _canary_watch(run: config.RunConfig, console: Console) -> Callable[[], None]:
    """Returns a function for the endpoint's loop that reports, once, that the canary was taken out of rotation."""
    from ftray import storage
    from ftray.errors import StorageError
    from ftray.serve.routing import POLL_S, event_uri

    is_reported, ticks = False, 0

    def poll() -> None:
        nonlocal is_reported, ticks
        ticks += 1
        if run.serve.canary is None or is_reported or ticks % int(2 * POLL_S):
            return
        uri = event_uri(storage.absolute(run.directory), run.serve.ab, run.serve.canary)
        try:
            if storage.exists(uri):
                event, is_reported = storage.read_object(uri), True
                console.say(f"the canary {event.get('model')} gets no more requests: {event.get('reason')}  ({uri})")
        except StorageError:
            return

    return poll


def _curl(url: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return f"try: curl {url}/chat/completions -H 'content-type: application/json' -d '{body}'"
