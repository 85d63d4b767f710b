"""Commands for clusters: `submit`, `status`, `logs`, `stop`, `doctor`, `k8s render`."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from ftray import config
from ftray.cli.context import AsJson, Overrides, RunTarget, command, open_target
from ftray.console import Console
from ftray.errors import ConfigError

Address = Annotated[
    str | None,
    Option(help="The cluster's dashboard, such as http://head:8265. Default: RAY_API_SERVER_ADDRESS."),
]
Insecure = Annotated[
    bool, Option("--insecure", help="Send the cluster's token over plain http, even to another machine.")
]
JobName = Annotated[str, Argument(metavar="NAME", help="A run, or a job (<run>-<n>).", show_default=False)]


@command()
def submit(
    target: RunTarget,
    overrides: Overrides = None,
    address: Address = None,
    insecure: Insecure = False,
    verb: Annotated[
        Literal["run", "train", "evaluate", "export"], Option(help="The command that the job executes.")
    ] = "run",
    no_wait: Annotated[bool, Option("--no-wait", help="Return at once instead of following the job.")] = False,
    wait_for_nodes: Annotated[
        bool, Option("--wait-for-nodes", help="Wait until the autoscaler has started the machines.")
    ] = False,
    no_check: Annotated[bool, Option("--no-check", help="Skip the check of the cluster.")] = False,
    *,
    console: Console,
) -> int:
    """Run a file as a job on a Ray cluster, and follow it."""
    from ftray.cluster.jobs import JobClient
    from ftray.cluster.submit import SubmitOptions
    from ftray.cluster.submit import submit as start
    from ftray.cluster.uri_check import check_storage

    run = config.load_run(target, overrides)
    check_storage(run)
    jobs = JobClient(address, insecure)
    options = SubmitOptions(verb, not no_check, wait_for_nodes, not no_wait)
    return start(run, Path(target).stem, options, jobs, console)


@command()
def job_status(
    name: Annotated[str | None, Argument(help="A run, or a job (<run>-<n>).", show_default=False)] = None,
    address: Address = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
    *,
    console: Console,
) -> int:
    """Show the jobs of a cluster, or of one run."""
    from ftray.cluster.jobs import JobClient
    from ftray.cluster.submit import status

    return status(JobClient(address, insecure), name, as_json, console)


@command()
def job_logs(
    name: JobName,
    address: Address = None,
    insecure: Insecure = False,
    follow: Annotated[
        bool, Option("--follow", help="Follow the output to the job's end, and return the job's exit code.")
    ] = False,
    *,
    console: Console,
) -> int:
    """Show the output of a job."""
    from ftray.cluster.jobs import JobClient
    from ftray.cluster.submit import logs

    return logs(JobClient(address, insecure), name, follow, console)


@command()
def job_stop(name: JobName, address: Address = None, insecure: Insecure = False, *, console: Console) -> int:
    """Stop a job; it commits a checkpoint first."""
    from ftray.cluster.jobs import JobClient
    from ftray.cluster.submit import stop

    return stop(JobClient(address, insecure), name, console)


@command()
def doctor(
    target: Annotated[
        str | None, Argument(help="Run file whose storage and workers are checked.", show_default=False)
    ] = None,
    storage: Annotated[
        str | None, Option(help="Directory or s3:// prefix to measure. Default: the run's storage.")
    ] = None,
    wait_for_nodes: Annotated[
        bool, Option("--wait-for-nodes", help="Request the run's machines from the autoscaler, and wait.")
    ] = False,
    links: Annotated[bool, Option("--links", help="Also measure an all-reduce between the nodes.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one line of JSON per check.")] = False,
    *,
    console: Console,
) -> int:
    """Check this machine, or the cluster of RAY_ADDRESS: versions, GPUs, storage, clock, disk, memory."""
    from dataclasses import asdict

    from ftray.cli.session import ray_session
    from ftray.cluster.doctor import (
        HealthCheck,
        examine,
        examine_cluster,
        has_room,
        judge,
        lines_of,
        place_of,
        worst_of,
    )

    run = open_target(target) if target else None
    place = place_of(run, storage)
    network: list[HealthCheck] = []
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        nodes = [examine(place)]
    else:
        with ray_session(0):
            if run is not None and wait_for_nodes:
                from ftray.cluster.autoscaler import wait_for_nodes as wait

                wait(run, partial(has_room, run))
            nodes = examine_cluster(place)
            if links:
                from ftray.cluster.network_test import measure_links

                network = [measure_links()]
    checks = judge(nodes, run) + network
    for line in [json.dumps(asdict(each)) for each in checks] if as_json else lines_of(checks):
        console.say(line)
    return 1 if worst_of(checks) else 0


@command()
def k8s_render(
    target: RunTarget,
    overrides: Overrides = None,
    directory: Annotated[str | None, Option("-o", metavar="DIR", help="Write files there instead of printing.")] = None,
    machine: Annotated[
        str | None, Option(help="Machine type, such as p4de.24xlarge. Default: chosen by scale.accelerator.")
    ] = None,
    image: Annotated[str | None, Option(help="Container image. Default: ftray:<version>-cuda or -cpu.")] = None,
    parts: Annotated[
        str | None, Option(metavar="LIST", help="Comma-separated parts. Default: all except raycluster.")
    ] = None,
    role_arn: Annotated[str | None, Option(metavar="ARN", help="AWS role that pods of this run assume (IRSA).")] = None,
    *,
    console: Console,
) -> int:
    """Write the KubeRay manifests of a run file."""
    from ftray.cluster.render import DEFAULT_PARTS, PARTS, as_yaml, render, write

    run = open_target(target, overrides)
    selected = tuple(parts.split(",")) if parts else DEFAULT_PARTS
    if unknown := [part for part in selected if part not in PARTS]:
        raise ConfigError(f"--parts {unknown[0]} is unknown; use {', '.join(PARTS)}")
    manifests = render(run, machine, image, selected, role_arn)
    if directory is None:
        console.say("---\n".join(as_yaml(tree) for tree in manifests.values()).rstrip("\n"))
        return 0
    for path in write(manifests, Path(directory)):
        console.say(str(path))
    return 0
