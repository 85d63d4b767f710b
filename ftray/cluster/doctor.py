"""Health checks of a cluster's machines, with verdicts and remedies.

`examine` collects facts of its machine, as one Ray task per node; `judge` is a pure function of them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from ftray import config, storage
from ftray.errors import StorageError
from ftray.storage import s3

PACKAGES = ("ftray", "ray", "torch", "transformers", "peft", "deepspeed", "numpy", "pyarrow")
PROBE_BYTES = 32 * 2**20
GIB = 2**30
SLOW_MB_S = 20.0
SKEW_WARN_S, SKEW_BAD_S = 2.0, 30.0
DISK_WARN_GIB, DISK_BAD_GIB = 20.0, 5.0
SHM_BAD_GIB, SHM_WARN_GIB = 0.5, 8.0  # Docker gives 64 MB unless told
NODE_S = 120.0

Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class HealthCheck:
    """One check with its verdict, the observed fact, and the remedy."""

    check: str
    verdict: Verdict
    fact: str
    remedy: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """Facts about one machine.

    Attributes:
        skew_s: Its clock minus the driver's, in seconds.
        store_skew_s: Its clock minus the store's.
        resources: Its Ray resources; empty without Ray.
        error: Why the machine could not be examined.
    """

    host: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    driver: str = ""
    memory_gib: float = 0.0
    shm_gib: float = 0.0
    disk_gib: float = 0.0
    skew_s: float = 0.0
    store_skew_s: float | None = None
    write_mb_s: float | None = None
    read_mb_s: float | None = None
    storage_error: str = ""
    resources: dict[str, float] = field(default_factory=dict)
    error: str = ""


def examine(place: str | None, size_bytes: int = PROBE_BYTES) -> NodeFacts:
    """Examines this machine. place: a directory or s3:// prefix for a temporary test file."""
    gpus, driver = _gpus()
    facts = NodeFacts(
        host=socket.gethostname(),
        versions=_versions(),
        gpus=gpus,
        driver=driver,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        shm_gib=shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0,
        disk_gib=_free_gib(storage.cache_directory()),
    )
    if place is None:
        return facts
    uri = storage.join(storage.absolute(place), f".doctor-{uuid4().hex}")
    try:
        return replace(facts, **_measure(uri, size_bytes))
    except StorageError as err:
        return replace(facts, storage_error=str(err))


def _measure(uri: str, size_bytes: int) -> dict[str, Any]:
    """Write and read speed of one file in MB/s, and the store's clock skew. Raises StorageError."""
    body = os.urandom(size_bytes)
    try:
        began = time.monotonic()
        storage.write_bytes(uri, body)
        written = time.monotonic()
        same = storage.read_bytes(uri) == body
        read = time.monotonic()
        if not same:
            raise StorageError(f"{uri} returned other bytes than were written")
        skew = _store_skew(uri) if storage.is_remote(uri) else None
    finally:
        storage.delete(uri)
    megabytes = size_bytes / 1e6
    return {
        "write_mb_s": megabytes / max(1e-6, written - began),
        "read_mb_s": megabytes / max(1e-6, read - written),
        "store_skew_s": skew,
    }


def _store_skew(uri: str) -> float:
    head = s3.request("head_object", uri)
    return time.time() - parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def _gpus() -> tuple[tuple[str, ...], str]:
    """Names of this machine's GPUs and their driver's version."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), ""
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)  # nosec B603 # a list of words, no shell
    lines = [line.rpartition(", ") for line in done.stdout.splitlines() if ", " in line]
    return tuple(name for name, _, _ in lines), lines[0][2] if lines else ""


def _free_gib(path: Path) -> float:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / GIB


def examine_cluster(place: str | None) -> list[NodeFacts]:
    """Facts of every live node of the joined Ray cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    all_facts = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(examine).options(num_cpus=0, scheduling_strategy=here, max_retries=0)
        host = node["NodeManagerHostname"]
        try:
            facts = ray.get(task.remote(place), timeout=NODE_S)
            skew_s = _skew(ray.remote(_now).options(num_cpus=0, scheduling_strategy=here))
            facts = replace(facts, host=host, skew_s=skew_s, resources=dict(node["Resources"]))
        except ray.exceptions.GetTimeoutError:
            facts = NodeFacts(host, error=f"no answer within {NODE_S:.0f} s", resources=dict(node["Resources"]))
        except ray.exceptions.RayError as err:
            facts = NodeFacts(host, error=" ".join(str(err).split())[-200:], resources=dict(node["Resources"]))
        all_facts.append(facts)
    return all_facts


def _now() -> float:
    return time.time()


def _skew(clock: Any) -> float:
    """Seconds that a node's clock is ahead of this one, with an error of half the shortest round trip."""
    import ray

    best, skew_s = NODE_S, 0.0
    for _ in range(3):
        asked = time.time()
        there = ray.get(clock.remote(), timeout=NODE_S)
        answered = time.time()
        if answered - asked < best:
            best, skew_s = answered - asked, there - (asked + answered) / 2
    return skew_s


def judge(nodes: list[NodeFacts], run: config.RunConfig | None = None) -> list[HealthCheck]:
    """One verdict per check over all machines. run: its resource needs are checked too."""
    lost = [node for node in nodes if node.error]
    well = [node for node in nodes if not node.error]
    checks = (_packages, _gpu_kinds, _storage, _clock, _disk, _shm)
    findings = [_nodes(nodes, lost), *(check(well) for check in checks)]
    if run is not None:
        findings.append(_room(run, well))
    return findings


def _nodes(nodes: list[NodeFacts], lost: list[NodeFacts]) -> HealthCheck:
    if lost:
        return HealthCheck(
            "nodes", "bad", f"{lost[0].host}: {lost[0].error}", "install the same image there, or remove the node"
        )
    return HealthCheck("nodes", "ok", f"{len(nodes)} reachable")


def _packages(nodes: list[NodeFacts]) -> HealthCheck:
    for name in ("python", *PACKAGES):
        at: dict[str, list[str]] = defaultdict(list)
        for node in nodes:
            at[node.versions.get(name, "missing")].append(node.host)
        if len(at) > 1 or "missing" in at:
            told = ", ".join(
                f"{version} on {' '.join(sorted(set(hosts))[:3])}" for version, hosts in sorted(at.items())
            )
            return HealthCheck("versions", "bad", f"{name} is {told}", "use the same image on all nodes")
    one = nodes[0].versions if nodes else {}
    return HealthCheck(
        "versions", "ok", ", ".join(f"{name} {one.get(name)}" for name in ("python", "ftray", "ray", "torch"))
    )


def _gpu_kinds(nodes: list[NodeFacts]) -> HealthCheck:
    counts: dict[str, int] = defaultdict(int)
    for node in nodes:
        for name in node.gpus:
            counts[name] += 1
    drivers = {node.driver for node in nodes if node.gpus}
    told = ", ".join(f"{number} × {name}" for name, number in sorted(counts.items())) or "none"
    if unseen := [n for n in nodes if n.resources and n.resources.get("GPU", 0) < len(n.gpus)]:
        node = unseen[0]
        fact = f"{node.host} has {len(node.gpus)} GPUs, but Ray sees only {node.resources.get('GPU', 0):g}"
        return HealthCheck("gpus", "warn", fact, "start Ray there without --num-gpus")
    if len(counts) > 1:
        return HealthCheck("gpus", "warn", told, "the slowest GPU sets the pace of a run: set scale.accelerator")
    if len(drivers) > 1:
        return HealthCheck(
            "gpus", "warn", f"{told}, drivers {', '.join(sorted(drivers))}", "use one driver on all nodes"
        )
    return HealthCheck("gpus", "ok", f"{told}{f', driver {drivers.pop()}' if drivers else ''}")


def _storage(nodes: list[NodeFacts]) -> HealthCheck:
    if failed := [node for node in nodes if node.storage_error]:
        node = failed[0]
        return HealthCheck("storage", "bad", f"{node.host}: {node.storage_error}", "give the nodes a role with access")
    measured = [node for node in nodes if node.write_mb_s is not None and node.read_mb_s is not None]
    if not measured:
        return HealthCheck("storage", "ok", "not checked (use a run file, or --storage)")
    write, read = min(n.write_mb_s or 0 for n in measured), min(n.read_mb_s or 0 for n in measured)
    told = f"write {write:.0f} MB/s, read {read:.0f} MB/s{' on the slowest node' if len(measured) > 1 else ''}"
    if min(write, read) < SLOW_MB_S:
        return HealthCheck("storage", "warn", told, "use a bucket in the nodes' region, with an S3 gateway endpoint")
    return HealthCheck("storage", "ok", told)


def _clock(nodes: list[NodeFacts]) -> HealthCheck:
    skews = [(abs(s), node.host) for node in nodes for s in (node.skew_s, node.store_skew_s or 0.0)]
    worst, host = max(skews, default=(0.0, ""))
    if worst < SKEW_WARN_S:
        return HealthCheck("clock", "ok", f"within {SKEW_WARN_S:g} s")
    verdict: Verdict = "bad" if worst >= SKEW_BAD_S else "warn"
    return HealthCheck(
        "clock", verdict, f"{host} is {worst:.0f} s off", "run chrony there: S3 rejects signatures with a wrong time"
    )


def _disk(nodes: list[NodeFacts]) -> HealthCheck:
    return _least(
        nodes,
        "disk",
        lambda node: node.disk_gib,
        "free in the cache",
        DISK_WARN_GIB,
        DISK_BAD_GIB,
        "free some, or set HOME",
    )


def _shm(nodes: list[NodeFacts]) -> HealthCheck:
    remedy = "docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    return _least(nodes, "shm", lambda node: node.shm_gib, "in /dev/shm", SHM_WARN_GIB, SHM_BAD_GIB, remedy)


def _least(
    nodes: list[NodeFacts],
    check: str,
    of: Callable[[NodeFacts], float],
    what: str,
    warn: float,
    bad: float,
    remedy: str,
) -> HealthCheck:
    least = min(nodes, key=of, default=None)
    if least is None:
        return HealthCheck(check, "ok", "no node was examined")
    told = f"{least.host} has {of(least):.1f} GiB {what}"
    if of(least) >= warn:
        return HealthCheck(check, "ok", told)
    return HealthCheck(check, "bad" if of(least) < bad else "warn", told, remedy)


def _room(run: config.RunConfig, nodes: list[NodeFacts]) -> HealthCheck:
    """Whether the cluster can place the minimum number of workers, as `ftray train` requires."""
    kind, fewest = run.scale.accelerator, run.world_sizes[-1]
    those = [
        n for n in nodes if kind is None or f"accelerator_type:{kind}" in n.resources or (not n.resources and n.gpus)
    ]
    has_gpus = any(n.resources.get("GPU", len(n.gpus)) for n in those)
    number = sum(
        n.resources.get("GPU", len(n.gpus)) if has_gpus else n.resources.get("CPU", 0) / run.scale.cpus_per_worker
        for n in those
    )
    what = f"{kind or 'GPU'}s" if kind or has_gpus else "workers' CPUs"
    if int(number) < fewest and (kind or has_gpus or any(n.resources for n in nodes)):
        remedy = "lower scale.num_workers, or add nodes"
        return HealthCheck("room", "bad", f"{int(number)} {what}, the run needs {fewest}", remedy)
    return HealthCheck("room", "ok", f"for {fewest} workers")


def has_room(run: config.RunConfig) -> bool:
    """Whether the joined cluster can place the run's minimum number of workers now."""
    import ray

    nodes = [
        NodeFacts(node["NodeManagerHostname"], resources=node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]
    return _room(run, nodes).verdict == "ok"


def lines_of(findings: list[HealthCheck]) -> list[str]:
    """Checks as lines, with remedies below."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<5}{finding.check:<10}{finding.fact}")
        if finding.remedy:
            lines.append(f"{'':<15}→ {finding.remedy}")
    return lines


def worst_of(findings: list[HealthCheck]) -> HealthCheck | None:
    """The first bad check."""
    return next((finding for finding in findings if finding.verdict == "bad"), None)


def place_of(run: config.RunConfig | None, given: str | None) -> str | None:
    """The place whose bandwidth is measured: the option, or the run's storage."""
    return given or (run.storage if run is not None else None)
