"""The verbs `publish` and `serve`: from runs, with their checkpoints and gates, to what the serve room is told.

The serve room knows no runs and no training; what it needs of them is looked up here, before Ray starts.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray import config
from ftray.cli.context import open_target
from ftray.console import Console
from ftray.errors import CheckpointError, ConfigError, GateError, ModelError

if TYPE_CHECKING:
    from ftray.serve.adapter_cache import ServedModels

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _exported_adapter(run: config.RunConfig, target: str) -> tuple[str, str, int, dict[str, Any]]:
    """Finds the exported adapter of a finished run.

    Args:
        run: The run.
        target: The run file as the user named it, for messages.

    Returns:
        The run's directory, the adapter's directory, its step, and its manifest.

    Raises:
        ConfigError: The run makes no LoRA adapter, is not finished, or its best checkpoint is not exported.
        CheckpointError: The best checkpoint is damaged.
    """
    from ftray import storage
    from ftray.driver.run_record import finished_checkpoint
    from ftray.train.checkpoint.catalog import best_checkpoint, has_begun

    if run.method.type not in ("lora", "qlora"):
        raise ConfigError(
            f"method.type {run.method.type} makes no LoRA adapter, and only these are published; use lora"
        )
    run_dir = storage.absolute(run.directory)
    if has_begun(run_dir):
        best_checkpoint(run_dir)  # a damaged one is named, instead of one before it being taken for the end
    if finished_checkpoint(run, verify=False) is None:
        raise ConfigError(f"the run '{run.name}' is not trained to its end; finish it first: ftray train {target}")
    step = best_checkpoint(run_dir).step
    model_dir = storage.join(run_dir, "model")
    manifest = storage.read_manifest(model_dir)
    if manifest is None or manifest["meta"].get("step") != step:
        raise ConfigError(f"{model_dir} does not hold the model of step {step}; write it first: ftray export {target}")
    return run_dir, model_dir, step, manifest


def publish(arguments: argparse.Namespace, console: Console) -> int:
    """Makes a run's adapter servable beside its base, or takes it away."""
    from ftray import storage
    from ftray.serve import registry
    from ftray.serve.model_metadata import reference_of
    from ftray.serve.signing import Signer

    run = open_target(arguments.run, arguments.overrides)
    name = registry.check_name(arguments.name or run.name)
    base = _base_of(run)
    place = registry.registry_of(run.storage, base.base)
    public = f"{registry.base_name(base.base)}:{name}"
    if arguments.list:
        _list_registry(place, registry.base_name(base.base), run.serve, console)
        return 0
    owner, signer = _owner(arguments.owner), Signer(arguments.sign) if arguments.sign else None
    if arguments.remove:
        number = registry.remove(place, name, owner=owner, signer=signer, take_over=arguments.take_over)
        console.say(f"{public} is no longer published ({number} version{'s' if number > 1 else ''} removed)")
        return 0
    run_dir, model_dir, step, manifest = _exported_adapter(run, arguments.run)
    _check_gates(run_dir, step, arguments.run)
    meta: dict[str, Any] = {"base": base.base, "revision": base.revision, "run": run.name, "step": step}
    meta |= {"lineage": manifest["meta"]["lineage"]} if "lineage" in manifest["meta"] else {}
    meta |= {"reference": reference} if (reference := reference_of(run_dir)) else {}
    found, is_new = registry.publish(
        place,
        name,
        model_dir,
        storage.join(model_dir, "merged"),
        meta,
        owner=owner,
        signer=signer,
        take_over=arguments.take_over,
    )
    said = (
        f"published {public}, version {found.version}: {found.uri}"
        if is_new
        else f"{public} is published already: {found.uri}"
    )
    if signer is not None:
        said += f"\nsigned; endpoints that ask for a signature trust it with serve.trusted_keys=[{signer.public_key}]"
    console.say(f"{said}\nendpoints that serve its base take it up within seconds: ftray serve {arguments.run}")
    return 0


def _owner(typed: str | None) -> str:
    """Who publishes: as typed, or as the environment tells. Raises ConfigError for a name that can't be kept."""
    owner = typed or os.environ.get("FTRAY_OWNER")
    if not owner:
        try:
            owner = getpass.getuser()
        except (OSError, KeyError):  # a container's user may have no name
            raise ConfigError("who publishes is not known; give --owner, or set FTRAY_OWNER") from None
    if not owner.strip() or len(owner) > 256 or not owner.isprintable():
        raise ConfigError(f"--owner {owner[:60]!r} can't be kept; give 1 to 256 printable characters")
    return owner


def _list_registry(place: str, base: str, serve_cfg: config.ServeConfig, console: Console) -> None:
    """Shows the version of each adapter that is served, and each that is not, with the reason."""
    from ftray.serve.registry import scan

    bytes_at_most = serve_cfg.max_adapter_mb * 1_000_000
    found = scan(place, trusted=serve_cfg.trusted_keys, max_adapter_bytes=bytes_at_most)
    for name, one in found.adapters.items():
        signed = ", signed" if "signature" in one.meta else ""
        console.say(f"{base}:{name}  version {one.version}, owner {one.meta.get('owner', 'unknown')}{signed}")
    if not found.adapters:
        console.say(f"nothing that can be served is published under {place}")
    for rejected in found.rejected.values():
        console.warn(str(rejected))


def _check_gates(run_dir: str, step: int, target: str) -> None:
    """Raises GateError if a gate refused this step, ConfigError if the gates saw another one. No gates: fine."""
    from ftray import storage

    uri = storage.join(run_dir, "evaluate", "results.json")
    remedy = f"so that no gate is known to pass; evaluate anew: ftray evaluate {target}"
    results = storage.find_object(uri, remedy) or {}
    gates = results.get("gates") or []
    if not isinstance(gates, list) or not all(isinstance(gate, dict) for gate in gates):
        raise ConfigError(f"{uri} is damaged (gates), {remedy}")
    if gates and results.get("step") != step:
        raise ConfigError(
            f"the gates saw step {results.get('step')}, not step {step}; evaluate it: ftray evaluate {target}"
        )
    failed = [str(gate.get("name")) for gate in gates if not gate.get("passed")]
    if failed:
        raise GateError(
            f"not published: the gate{'s' if len(failed) > 1 else ''} {', '.join(failed)} refused the model; see {uri}"
        )


def _base_of(run: config.RunConfig) -> config.ModelConfig:
    """What runs on the same base agree on, whatever directory a command was typed in."""
    from ftray.model.load import absolute_base

    return absolute_base(run.model)


def serve(arguments: argparse.Namespace, console: Console) -> int:
    """Serves a run, and other runs' adapters beside it, until Ctrl-C; or prints the Serve config."""
    from ftray import storage
    from ftray.cli.session import quiet, ray_session
    from ftray.serve import proxy
    from ftray.serve.auth import read_key_hashes
    from ftray.serve.model_metadata import reference_of
    from ftray.serve.preflight import check_holds, check_installed
    from ftray.serve.run import check_endpoint, run_until_signal, serve_config, start_endpoint

    overrides = [word for word in arguments.overrides if "=" in word]
    run = open_target(arguments.run, overrides)
    if run.method.type == "prompt-tuning":
        raise ConfigError(
            "method.type prompt can't be served: its virtual tokens are no weights of the model; load the adapter in "
            f"{storage.join(storage.absolute(run.directory), 'model')} with PEFT, or train with lora"
        )
    more = [word for word in arguments.overrides if "=" not in word]
    check_holds(run)
    if not arguments.config:
        check_installed(run.serve)
        read_key_hashes(run.serve.host)  # who may ask is settled before anything is looked for
    model_dir, served = _what_to_serve(run, more)
    dirs = {run.name: storage.absolute(run.directory)} | {
        n: uri.rpartition("/")[0] for n, uri in served.adapters.items()
    }
    served = replace(served, references={n: found for n, place in dirs.items() if (found := reference_of(place))})
    replica: dict[str, Any] = {
        "place": storage.absolute(run.directory),
        "dtype": _DTYPES[run.train.precision],
        "num_gpus": float(run.serve.tensor_parallel if run.scale.accelerator else 0),
    }
    _check_shares(run.serve, served)
    if arguments.config:
        import yaml

        console.say(yaml.safe_dump(serve_config(model_dir, served, run.serve, **replica), sort_keys=False).rstrip())
        return 0
    say_step(run, arguments.run, console)
    check_endpoint(model_dir, run.serve)
    proxy.announce()
    with quiet(run.name, console), ray_session(run.serve.max_replicas * run.scale.cpus_per_worker):
        replica["num_gpus"] = _gpus_for(run, replica["num_gpus"], console)
        endpoint = start_endpoint(model_dir, served, run.serve, name=run.name, warn=console.warn, **replica)
        console.say(f"serving {run.name} at {endpoint.url}  (Ctrl-C drains and stops)\n{_curl(endpoint.url, run.name)}")
        if served.registry:
            console.say(
                f"side by side: {endpoint.url.removesuffix('v1')}  adapters published for {served.model_id} appear by themselves"
            )
        run_until_signal(endpoint, _events(run, console))
    return 0


def say_step(run: config.RunConfig, target: str, console: Console) -> None:
    """Warns when the exported model that is served is not that of the run's best checkpoint, or that one is damaged.

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
            f"{storage.join(place, storage.MANIFEST)} is damaged; write the model anew: ftray export {target}"
        ) from None
    step = manifest["meta"].get("step") if manifest else None
    if step is None:  # not an export of this run's
        return
    try:
        best = best_checkpoint(run_dir).step
    except ConfigError:  # without its checkpoints
        return
    except CheckpointError as err:
        console.warn(f"the model that is served is of step {step}; {err}")
        return
    if step != best:
        console.warn(
            f"the model that is served is of step {step}, the run's best checkpoint of step {best}; to serve that one: "
            f"ftray export {target}"
        )


def _gpus_for(run: config.RunConfig, wanted: float, console: Console) -> float:
    """GPUs of a replica, none where there are none and it can do without. Raises ConfigError: Serve would only wait."""
    import ray

    there, needed = ray.cluster_resources().get("GPU", 0.0), wanted * max(1, run.serve.min_replicas)
    if there >= needed:
        return wanted
    if there == 0 and run.serve.engine == "transformers":
        console.warn(f"scale.accelerator is {run.scale.accelerator}, but there is no GPU here: the CPU answers")
        return 0.0
    raise ConfigError(
        f"{max(1, run.serve.min_replicas)} replicas (serve.min_replicas) of {wanted:g} GPUs need {needed:g}, there are "
        f"{there:g}; lower serve.min_replicas or serve.tensor_parallel, or serve where there are more"
    )


def _what_to_serve(run: config.RunConfig, more: list[str]) -> tuple[str, ServedModels]:
    """Model directory or hub id, and which models stand for it and its adapters."""
    from ftray import storage
    from ftray.model.load import resolve_base
    from ftray.serve.adapter_cache import ServedModels
    from ftray.serve.model_files import check_model
    from ftray.serve.model_metadata import lineages_of
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
            raise ConfigError(
                f"two of what is to be served are called {name}; rename one, or publish it under another name"
            )
        adapters[name] = uri
    if (model_id := base_name(base.base)) in adapters:
        model_id = f"{model_id}-base"
    place, most = registry_of(run.storage, base.base), run.serve.max_adapters
    served = ServedModels(model_id, adapters, place, base.base, base.revision, most, lineages=lineages_of(adapters))
    return resolve_base(run.model), served


def _adapter_of(word: str, base: config.ModelConfig) -> tuple[str, str]:
    """Name and URI of a further run's adapter, or of an adapter's directory."""
    from ftray import storage
    from ftray.engine.adapters import CONFIG_FILE
    from ftray.serve.registry import check_name

    uri = storage.absolute(word)
    if storage.exists(storage.join(uri, CONFIG_FILE)):
        return check_name(Path(uri).name), uri
    other = open_target(word, [])
    theirs = _base_of(other)
    if (theirs.base, theirs.revision) != (base.base, base.revision):
        raise ConfigError(
            f"{word} was trained on {theirs.base}, not on {base.base}; adapters of one base are served together"
        )
    uri = storage.join(storage.absolute(other.directory), "model")
    if other.method.type not in ("lora", "qlora") or not storage.exists(storage.join(uri, CONFIG_FILE)):
        raise ConfigError(f"{uri} holds no LoRA adapter; write it first: ftray export {word}")
    return other.name, uri


def _check_shares(serve_cfg: config.ServeConfig, served: ServedModels) -> None:
    """Raises ConfigError for a model of serve.ab that is not there."""
    if not serve_cfg.ab:
        return
    from ftray.serve.registry import list_published

    published = list_published(served.registry, serve_cfg.trusted_keys) if served.registry else {}
    there = [served.model_id, *served.adapters, *(f"{served.model_id}:{name}" for name in published)]
    if missing := [model for model in serve_cfg.ab if model not in there]:
        raise ConfigError(f"serve.ab names {missing[0]}, which is not there; there are {', '.join(there)}")


def _events(run: config.RunConfig, console: Console) -> Any:
    """Tells what replicas decided: a canary that was returned, once."""
    from ftray import storage
    from ftray.errors import StorageError
    from ftray.serve.routing import POLL_S, event_uri

    told, ticks = False, 0

    def look() -> None:
        nonlocal told, ticks
        ticks += 1
        if run.serve.canary is None or told or ticks % int(2 * POLL_S):
            return
        uri = event_uri(storage.absolute(run.directory), run.serve.ab, run.serve.canary)
        try:
            if storage.exists(uri):
                event, told = storage.read_object(uri), True
                console.say(f"the canary {event.get('model')} gets no more requests: {event.get('why')}  ({uri})")
        except StorageError:
            return

    return look


def _curl(url: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return f"try: curl {url}/chat/completions -H 'content-type: application/json' -d '{body}'"
