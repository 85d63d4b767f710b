"""The verbs of clusters: `submit`, `status`, `logs`, `stop`, `doctor`, `k8s render`."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

from ftray import config
from ftray.cli.context import open_target
from ftray.console import Console
from ftray.errors import ConfigError


def submit(arguments: argparse.Namespace, console: Console) -> int:
    """Runs a file as a job of a Ray cluster, and follows it; returns the exit code of what ran there."""
    from ftray.cluster.jobs import JobClient
    from ftray.cluster.submit import SubmitOptions
    from ftray.cluster.submit import submit as start
    from ftray.cluster.uri_check import check_storage

    run = config.load_run(arguments.run, arguments.overrides)
    check_storage(run)
    jobs = JobClient(arguments.address, arguments.insecure)
    manner = SubmitOptions(arguments.what, not arguments.no_check, arguments.wait_for_nodes, not arguments.no_wait)
    return start(run, Path(arguments.run).stem, manner, jobs, console)


def job_status(arguments: argparse.Namespace, console: Console) -> int:
    """Shows jobs."""
    from ftray.cluster.jobs import JobClient
    from ftray.cluster.submit import status

    return status(JobClient(arguments.address, arguments.insecure), arguments.name, arguments.json, console)


def job_logs(arguments: argparse.Namespace, console: Console) -> int:
    """Shows what a job printed."""
    from ftray.cluster.jobs import JobClient
    from ftray.cluster.submit import logs

    return logs(JobClient(arguments.address, arguments.insecure), arguments.name, arguments.follow, console)


def job_stop(arguments: argparse.Namespace, console: Console) -> int:
    """Ends a job."""
    from ftray.cluster.jobs import JobClient
    from ftray.cluster.submit import stop

    return stop(JobClient(arguments.address, arguments.insecure), arguments.name, console)


def doctor(arguments: argparse.Namespace, console: Console) -> int:
    """Looks at this machine, or at the cluster of RAY_ADDRESS; 1 where something is bad."""
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

    run = open_target(arguments.run, arguments.overrides) if arguments.run else None
    place = place_of(run, arguments.storage)
    links: list[HealthCheck] = []
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        nodes = [examine(place)]
    else:
        with ray_session(0):
            if run is not None and arguments.wait_for_nodes:
                from ftray.cluster.autoscaler import wait_for_nodes

                wait_for_nodes(run, partial(has_room, run))
            nodes = examine_cluster(place)
            if arguments.links:
                from ftray.cluster.network_test import measure_links

                links = [measure_links()]
    findings = judge(nodes, run) + links
    for line in [json.dumps(asdict(found)) for found in findings] if arguments.json else lines_of(findings):
        console.say(line)
    return 1 if worst_of(findings) else 0


def k8s_render(arguments: argparse.Namespace, console: Console) -> int:
    """Writes, or prints, the Kubernetes manifests of a run file."""
    from ftray.cluster.render import DEFAULT_PARTS, PARTS, as_yaml, render, write

    run = open_target(arguments.run, arguments.overrides)
    parts = arguments.parts or DEFAULT_PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"--parts {unknown[0]} is not known; known are {', '.join(PARTS)}")
    manifests = render(run, arguments.machine, arguments.image, parts, arguments.role_arn)
    if arguments.directory is None:
        console.say("---\n".join(as_yaml(tree) for tree in manifests.values()).rstrip("\n"))
        return 0
    for path in write(manifests, Path(arguments.directory)):
        console.say(str(path))
    return 0
