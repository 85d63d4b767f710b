"""Runs as jobs of a Ray cluster: submit, follow, list, stop.

Before a run, a job with `ftray doctor` checks the cluster from inside. No secret travels with a job; the cluster has its own
credentials.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftray import config
from ftray.cluster.jobs import LIVE, STOP_S, JobClient, exit_code, next_id, short
from ftray.cluster.uri_check import local_extras
from ftray.console import Console, duration
from ftray.errors import ConfigError, Interrupted, Preempted, RunError

MOST_MB = 8.0  # of files uploaded with a job
CHECK_S = 300.0  # for the job that checks the cluster
SILENT_S = 60.0  # without an answer for this long, the job server counts as gone
POLL_S = 0.5


@dataclass(frozen=True)
class SubmitOptions:
    """How a run is submitted.

    Attributes:
        verb: The command that the job executes.
        look: Check the cluster first.
        start_nodes: Wait until the autoscaler has started the machines.
        wait: Follow the job to its end.
    """

    verb: str = "run"
    look: bool = True
    start_nodes: bool = False
    wait: bool = True


def submit(run: config.RunConfig, stem: str, options: SubmitOptions, jobs: JobClient, console: Console) -> int:
    """Submits a run, or follows its live job; returns the exit code of the job's command.

    Args:
        run: The run.
        stem: Name of the run file without its suffix.
        options: Options.
        jobs: The cluster's job server.
        console: For messages and the job's log.

    Raises:
        ConfigError: The run can't be submitted, or the cluster failed the check.
        Interrupted: Ctrl-C; the job continues.
        Preempted: The cluster went away.
    """
    _check_version(jobs)
    metadata = {"run": run.name, "config_hash": run.config_hash, "verb": options.verb}
    job = next((job for job in reversed(jobs.of(run.name)) if job.status in LIVE), None)
    if job is not None:
        if (job.metadata.get("config_hash"), job.metadata.get("verb")) != (run.config_hash, options.verb):
            raise ConfigError(
                f"the job {job.submission_id} of this run is live with other settings; wait for its end, or run: "
                f"ftray stop {job.submission_id} --address {jobs.address}"
            )
        job_id = job.submission_id
        console.say(f"the job {job_id} is live; following it")
    else:
        with packed(run, stem) as directory:
            if options.look or options.start_nodes:
                _look(jobs, run, stem, options, directory, console)
            job_id = next_id(run.name, [job.submission_id for job in jobs.of(run.name)])
            jobs.start(job_id, entrypoint(options.verb, stem), directory, metadata)
        console.say(f"submitted {job_id} to {jobs.address}  (config hash {run.config_hash})")
    return follow(jobs, job_id, console) if options.wait else 0


def entrypoint(verb: str, stem: str, *options: str) -> str:
    """The shell command of a job: a verb on the run file, whose name may have spaces."""
    return shlex.join(["ftray", verb, f"{stem}.yaml", *options])


@contextmanager
def packed(run: config.RunConfig, stem: str) -> Iterator[Path]:
    """A directory with the run file, overrides applied, and its local files. Raises ConfigError."""
    extras = local_extras(run)
    files = [file for extra in extras for file in _files_of(extra)]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    if megabytes > MOST_MB:
        largest = sorted(files, key=lambda file: -file.stat().st_size)[:3]
        names = ", ".join(f"{file} ({file.stat().st_size / 1e6:.1f} MB)" for file in largest)
        raise ConfigError(
            f"{megabytes:.1f} MB of local files are above the limit of {MOST_MB:g} MB per job: {names}; put them in a bucket"
        )
    with tempfile.TemporaryDirectory(prefix="ftray-submit-") as temporary:
        directory = Path(temporary)
        tree = run.model_dump(mode="json", exclude_unset=True)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        (directory / f"{stem}.yaml").write_text(text, encoding="utf-8")
        for file in files:
            target = directory / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        yield directory


def _files_of(extra: str) -> list[Path]:
    path = Path(extra)
    paths = [path] if path.is_file() else sorted(path.rglob("*") if path.is_dir() else Path().glob(extra))
    if not paths:
        raise ConfigError(f"{extra} does not exist here; correct the path, or use s3://…")
    return [file for file in paths if file.is_file()]


def _check_version(jobs: JobClient) -> None:
    import ray

    if jobs.ray_version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ConfigError(
            f"the cluster at {jobs.address} runs Ray {jobs.ray_version}, here is {ray.__version__}; install the same version"
        )


def _look(
    jobs: JobClient, run: config.RunConfig, stem: str, options: SubmitOptions, directory: Path, console: Console
) -> None:
    """Checks versions, GPUs and storage from inside the cluster. Raises ConfigError for a bad check."""
    job_id = f"{run.name}-check-{int(time.time() * 1000):x}"
    metadata = {"run": run.name, "config_hash": run.config_hash, "verb": "doctor"}
    waits = options.start_nodes
    if waits:
        console.say(f"waiting up to {duration(run.scale.wait_s)} (scale.wait_s) for machines …")
    command = entrypoint("doctor", stem, "--json", *(["--wait-for-nodes"] if waits else []))
    jobs.start(job_id, command, directory, metadata)
    patience_s = CHECK_S + (run.scale.wait_s if waits else 0.0)
    deadline = time.monotonic() + patience_s
    while (info := jobs.info(job_id)).status in LIVE:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"the cluster did not start the job {job_id} within {duration(patience_s)}; see its dashboard"
            )
        time.sleep(POLL_S)
    with jobs.explained():
        text = jobs.client.get_job_logs(job_id)
    findings = [json.loads(line) for line in text.splitlines() if line.startswith('{"check": ')]
    if not findings:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), info.message or "no output")
        raise ConfigError(
            f"`ftray doctor` can't run on the cluster at {jobs.address} ({short(last)}); install the same ftray there"
        )
    for finding in findings:
        if finding["verdict"] == "bad":
            raise ConfigError(
                f"the cluster at {jobs.address}: {finding['check']}: {finding['fact']}; {finding['remedy']}"
            )
        if finding["verdict"] == "warn":
            console.warn(f"{finding['check']}: {finding['fact']}; {finding['remedy']}")
    facts = {finding["check"]: finding["fact"] for finding in findings}
    console.say(
        "the cluster: " + "; ".join(f"{key} {facts[key]}" for key in ("nodes", "gpus", "storage") if key in facts)
    )


def follow(jobs: JobClient, job_id: str, console: Console) -> int:
    """Shows a job's log to its end; returns the exit code of its command."""
    try:
        asyncio.run(_tail(jobs, job_id, console))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped following {job_id}, which continues. The same command follows it again; to stop it: "
            f"ftray stop {job_id} --address {jobs.address}"
        ) from None
    return exit_code(jobs.info(job_id), job_id)


async def _tail(jobs: JobClient, job_id: str, console: Console) -> None:
    """Prints the log as it grows. Reconnects after a lost connection, without repeating lines."""
    shown, line, heard_s = 0, "", time.monotonic()
    while True:
        seen = 0
        try:
            pieces = jobs.client.tail_job_logs(job_id)
            while True:
                piece = await asyncio.wait_for(anext(pieces), SILENT_S)  # a silent connection is reopened
                heard_s = time.monotonic()
                new = piece[max(0, shown - seen) :]
                seen += len(piece)
                shown = max(shown, seen)
                *whole, line = (line + new).split("\n")
                for text in whole:
                    console.say(text)
        except StopAsyncIteration:
            pass
        except Exception:  # noqa: BLE001 - aiohttp and Ray raise many kinds; whether the job is over is asked below
            await asyncio.sleep(POLL_S)
        try:
            if jobs.info(job_id).status not in LIVE:
                break
            heard_s = time.monotonic()
        except Preempted:
            if time.monotonic() - heard_s > SILENT_S:
                raise
        await asyncio.sleep(POLL_S)
    if line:
        console.say(line)


def rows_of(listed: list[Any]) -> list[dict[str, Any]]:
    """Jobs as plain values."""
    rows = []
    for job in listed:
        end = (job.end_time or time.time() * 1000) if job.start_time else 0
        rows.append(
            {
                "job": job.submission_id,
                "run": job.metadata["run"],
                "verb": job.metadata.get("verb", ""),
                "status": str(job.status),
                "exit_code": job.driver_exit_code,
                "seconds": round((end - (job.start_time or 0)) / 1000),
                "config_hash": job.metadata.get("config_hash", ""),
            }
        )
    return rows


def status(jobs: JobClient, name: str | None, as_json: bool, console: Console) -> int:
    """Shows the jobs of a run, or of all runs."""
    rows = rows_of(jobs.of(name))
    if as_json:
        console.say(json.dumps(rows))
        return 0
    if not rows:
        console.say(f"no job {'of ' + name + ' ' if name else ''}on {jobs.address}")
        return 0
    table = [["job", "command", "status", "time"]]
    for row in rows:
        code = "" if row["exit_code"] in (None, 0) else f" (exit code {row['exit_code']})"
        table.append([row["job"], row["verb"], f"{row['status']}{code}", duration(row["seconds"])])
    console.table(table)
    return 0


def logs(jobs: JobClient, name: str, wait: bool, console: Console) -> int:
    """Shows a job's log; follows it to its end if asked, and then returns its exit code."""
    job = jobs.find(name)
    if wait:
        return follow(jobs, job.submission_id, console)
    with jobs.explained():
        console.say(jobs.client.get_job_logs(job.submission_id).rstrip("\n"))
    return 0


def stop(jobs: JobClient, name: str, console: Console) -> int:
    """Stops a job: it commits a checkpoint and ends."""
    job = jobs.find(name)
    if job.status not in LIVE:
        console.say(f"the job {job.submission_id} has already ended ({job.status})")
        return 0
    with jobs.explained():
        jobs.client.stop_job(job.submission_id)
    console.say(f"stopping {job.submission_id}: it commits a checkpoint first …")
    deadline = time.monotonic() + STOP_S + SILENT_S
    while jobs.info(job.submission_id).status in LIVE:
        if time.monotonic() > deadline:
            raise RunError(f"the job {job.submission_id} does not end; see the dashboard of {jobs.address}")
        time.sleep(POLL_S)
    console.say(f"stopped; the same `ftray submit` continues the run {job.metadata['run']}")
    return 0
