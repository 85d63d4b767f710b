"""The command `publish`: checks a run's adapter and gates, and adds the adapter to the registry of its base."""

from __future__ import annotations

import getpass
import os
from typing import Annotated, Any

from typer import Option

from ftray import config
from ftray.cli.context import Overrides, RunTarget, command, open_target
from ftray.console import Console
from ftray.errors import ConfigError, GateError


@command()
def publish(
    target: RunTarget,
    overrides: Overrides = None,
    name: Annotated[str | None, Option(help="Name of the adapter for clients. Default: the run's name.")] = None,
    remove: Annotated[bool, Option("--remove", help="Remove all versions of the adapter.")] = False,
    list_: Annotated[
        bool, Option("--list", help="List the adapters published for the base, and those that are rejected.")
    ] = False,
    sign: Annotated[
        str | None, Option(metavar="KEYFILE", help="Sign with this Ed25519 key (PEM); see serve.trusted_keys.")
    ] = None,
    owner: Annotated[str | None, Option(help="The publisher. Default: FTRAY_OWNER or the login name.")] = None,
    take_over: Annotated[
        bool, Option("--take-over", help="Publish or remove the adapter even if it belongs to another owner.")
    ] = False,
    *,
    console: Console,
) -> int:
    """Publish the run's adapter under <storage>/published/, for endpoints of its base."""
    from ftray.model.load import absolute_base
    from ftray.serve import registry
    from ftray.serve.signing import Signer

    run = open_target(target, overrides)
    adapter_name = registry.check_name(name or run.name)
    base = absolute_base(run.model)
    place = registry.registry_of(run.storage, base.base)
    public = f"{registry.base_name(base.base)}:{adapter_name}"
    if list_:
        _list_registry(place, registry.base_name(base.base), run.serve, console)
        return 0
    publisher, signer = _owner(owner), Signer(sign) if sign else None
    if remove:
        number = registry.remove(place, adapter_name, owner=publisher, signer=signer, take_over=take_over)
        console.say(f"{public} is no longer published ({number} version{'s' if number > 1 else ''} removed)")
        return 0
    model_dir, meta = _publishable(run, base, target)
    adapter, is_new = registry.publish(
        place,
        adapter_name,
        model_dir,
        f"{model_dir}/merged",
        meta,
        owner=publisher,
        signer=signer,
        take_over=take_over,
    )
    message = (
        f"published {public}, version {adapter.version}: {adapter.uri}"
        if is_new
        else f"{public} is already published: {adapter.uri}"
    )
    if signer is not None:
        message += f"\nsigned; endpoints trust it with serve.trusted_keys=[{signer.public_key}]"
    console.say(
        f"{message}\nrunning endpoints for this base load it within seconds; to start one: ftray serve {target}"
    )
    return 0


def _publishable(run: config.RunConfig, base: config.ModelConfig, target: str) -> tuple[str, dict[str, Any]]:
    """The exported model's directory and the metadata to publish with it. Raises as `_exported_adapter` and `_check_gates`."""
    from ftray.serve.model_files import reference_of

    run_dir, model_dir, step, manifest = _exported_adapter(run, target)
    _check_gates(run_dir, step, target)
    meta: dict[str, Any] = {"base": base.base, "revision": base.revision, "run": run.name, "step": step}
    meta |= {"lineage": manifest["meta"]["lineage"]} if "lineage" in manifest["meta"] else {}
    meta |= {"reference": reference} if (reference := reference_of(run_dir)) else {}
    return model_dir, meta


def _exported_adapter(run: config.RunConfig, target: str) -> tuple[str, str, int, dict[str, Any]]:
    """Finds the exported adapter of a finished run.

    Args:
        run: The run.
        target: The run file as the user named it, for messages.

    Returns:
        The run's directory, the adapter's directory, its step, and its manifest.

    Raises:
        ConfigError: The run does not produce a LoRA adapter, is not finished, or its best checkpoint is not exported.
        CheckpointError: The best checkpoint is damaged.
    """
    from ftray import storage
    from ftray.driver.run_record import finished_checkpoint
    from ftray.train.checkpoint.catalog import best_checkpoint, has_begun

    if run.method.type not in ("lora", "qlora"):
        raise ConfigError(
            f"method.type {run.method.type} does not produce a LoRA adapter, and only LoRA adapters can be published; use lora"
        )
    run_dir = storage.absolute(run.directory)
    if has_begun(run_dir):
        best_checkpoint(run_dir)  # raises for a damaged checkpoint, instead of taking an older one for the last
    if finished_checkpoint(run, verify=False) is None:
        raise ConfigError(f"the run '{run.name}' is not fully trained; finish it first: ftray train {target}")
    step = best_checkpoint(run_dir).step
    model_dir = storage.join(run_dir, "model")
    manifest = storage.read_manifest(model_dir)
    if manifest is None or manifest["meta"].get("step") != step:
        raise ConfigError(f"{model_dir} does not hold the model of step {step}; export it first: ftray export {target}")
    return run_dir, model_dir, step, manifest


def _check_gates(run_dir: str, step: int, target: str) -> None:
    """Raises GateError if a gate refused this step, ConfigError if the gates were evaluated for another step."""
    from ftray import storage

    uri = storage.join(run_dir, "evaluate", "results.json")
    remedy = f"so the gates are unknown; evaluate again: ftray evaluate {target}"
    results = storage.find_object(uri, remedy) or {}
    gates = results.get("gates") or []
    if not isinstance(gates, list) or not all(isinstance(gate, dict) for gate in gates):
        raise ConfigError(f"{uri} is damaged (gates), {remedy}")
    if gates and results.get("step") != step:
        raise ConfigError(
            f"the gates were evaluated for step {results.get('step')}, not for step {step}; evaluate it: ftray evaluate {target}"
        )
    failed = [str(gate.get("name")) for gate in gates if not gate.get("passed")]
    if failed:
        raise GateError(
            f"not published: the gate{'s' if len(failed) > 1 else ''} {', '.join(failed)} refused the model; see {uri}"
        )


def _owner(typed: str | None) -> str:
    """The publisher: from --owner or the environment. Raises ConfigError for an invalid name."""
    owner = typed or os.environ.get("FTRAY_OWNER")
    if not owner:
        try:
            owner = getpass.getuser()
        except (OSError, KeyError):  # a container's user may have no name
            raise ConfigError("the publisher is unknown; use --owner, or set FTRAY_OWNER") from None
    if not owner.strip() or len(owner) > 256 or not owner.isprintable():
        raise ConfigError(f"--owner {owner[:60]!r} is not a valid owner; use 1 to 256 printable characters")
    return owner


def _list_registry(place: str, base: str, serve_cfg: config.ServeConfig, console: Console) -> None:
    """Prints each adapter with the version that is served, and each rejected one with the reason."""
    from ftray.serve.registry import scan

    bytes_at_most = serve_cfg.max_adapter_mb * 1_000_000
    contents = scan(place, trusted=serve_cfg.trusted_keys, max_adapter_bytes=bytes_at_most)
    for name, adapter in contents.adapters.items():
        signed = ", signed" if "signature" in adapter.meta else ""
        console.say(f"{base}:{name}  version {adapter.version}, owner {adapter.meta.get('owner', 'unknown')}{signed}")
    if not contents.adapters:
        console.say(f"no servable adapter is published under {place}")
    for rejected in contents.rejected.values():
        console.warn(str(rejected))
