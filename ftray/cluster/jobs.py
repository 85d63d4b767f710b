"""The job server of a Ray cluster: jobs that ftray submitted there, and errors in a sentence each.

Knows HTTP's side of Ray (`ray.job_submission`); nothing of run files.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ftray.compat.ray_jobs import cluster_version
from ftray.errors import ConfigError, Interrupted, Preempted, RunError
from ftray.network import connect, is_loopback

AGENT_S = 60.0  # a head that just came up has no agent for jobs yet
STOP_S = 600  # seconds that a stopped job has to commit its checkpoint
LIVE = ("PENDING", "RUNNING")


class JobClient:
    """The job server of a cluster.

    Args:
        address: Its dashboard's; None: RAY_API_SERVER_ADDRESS.
        insecure: Send a token over http also to another machine.

    Raises:
        ConfigError: It can't be reached, asks for another token, or a token would go over the network in plain text.
    """

    def __init__(self, address: str | None, insecure: bool = False) -> None:
        url = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not url:
            raise ConfigError("--address is missing: the cluster's dashboard, e.g. --address http://head:8265")
        self.address = url if "://" in url else f"http://{url}"
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(f"--address {url}: give the dashboard's, e.g. http://head:8265")
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ.get("RAY_AUTH_MODE") == "token" and not insecure:
            self._refuse_plain_text()
        self._check_listening()
        from ray.job_submission import JobSubmissionClient

        with self.explained():
            self.client = JobSubmissionClient(self.address)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they report each upload and each end of a log
        with self.explained():
            self.ray_version = cluster_version(self.client)

    def _refuse_plain_text(self) -> None:
        """Raises ConfigError where anybody on the way could read the token, which lets its holder run code."""
        try:
            parts = urlsplit(self.address)
            host = parts.hostname or ""
        except ValueError:
            raise ConfigError(f"--address {self.address} is not a valid address; give e.g. https://head:8265") from None
        if parts.scheme == "http" and not is_loopback(host):
            raise ConfigError(
                f"--address {self.address} would send the cluster's token in plain text over the network; forward a port "
                f"(ssh -L 8265:{host}:{parts.port or 80} …, or kubectl port-forward) and give http://127.0.0.1:8265, use "
                "https, or add --insecure where the network is yours"
            )

    def _check_listening(self) -> None:
        parts = urlsplit(self.address)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            connect(parts.hostname or "", port)
        except (OSError, ValueError) as err:
            raise ConfigError(
                f"--address {self.address}: nobody answers ({err}); correct it, or start the cluster"
            ) from None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what Ray's client raises into one sentence."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as err:
            wrong = "refuses the token in RAY_AUTH_TOKEN" if "failed" in str(err)[:40] else "asks for a token"
            raise ConfigError(
                f"the cluster at {self.address} {wrong}; set RAY_AUTH_TOKEN to the cluster's own"
            ) from None
        except (requests.exceptions.JSONDecodeError, KeyError, TypeError):
            raise ConfigError(
                f"--address {self.address} is not a Ray dashboard; give its address, e.g. http://head:8265"
            ) from None
        except RuntimeError as err:  # any status that is not 200
            raise ConfigError(
                f"--address {self.address}: the server refuses ({short(err)}); give the address of a Ray dashboard, e.g. "
                "http://head:8265"
            ) from None
        except (ConnectionError, requests.exceptions.RequestException) as err:
            raise Preempted(
                f"the cluster at {self.address} doesn't answer any more ({short(err)}); submit again when it, or a new "
                "one, is up: the run continues"
            ) from None

    def of(self, run_name: str | None = None) -> list[Any]:
        """Jobs that ftray submitted, oldest first; those of one run, if named. The looks at the cluster aren't among them."""
        with self.explained():
            jobs = [job for job in self.client.list_jobs() if job.submission_id and (job.metadata or {}).get("run")]
        return sorted(
            (job for job in jobs if run_name in (None, job.metadata["run"]) and job.metadata.get("verb") != "doctor"),
            key=lambda job: job.start_time or 0,
        )

    def find(self, name: str) -> Any:
        """The job of that id, or the last of the run of that name. Raises ConfigError."""
        jobs = [job for job in self.of() if job.submission_id == name] or self.of(name)
        if not jobs:
            known = ", ".join(dict.fromkeys(job.metadata["run"] for job in self.of())) or "none"
            raise ConfigError(f"{name} is neither a job nor a run on {self.address}; its runs: {known}")
        return jobs[-1]

    def start(self, job_id: str, entrypoint: str, directory: Path, metadata: dict[str, str]) -> None:
        """Submits. Raises ConfigError for what the job server refuses."""
        environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}, "working_dir": str(directory)}
        with self.explained():
            deadline = time.monotonic() + AGENT_S
            while True:
                try:
                    self.client.submit_job(
                        entrypoint=entrypoint, submission_id=job_id, runtime_env=environment, metadata=metadata
                    )
                    return
                except RuntimeError as err:
                    if "No available agent" not in str(err) or time.monotonic() > deadline:
                        raise ConfigError(f"the cluster refuses the job {job_id}: {short(err)}") from None
                    time.sleep(1.0)

    def info(self, job_id: str) -> Any:
        """What is known of a job."""
        with self.explained():
            return self.client.get_job_info(job_id)


def next_id(name: str, known: list[str]) -> str:
    """`<name>-<n>`, one above the highest n in use."""
    numbers = [int(match[1]) for each in known if (match := re.fullmatch(re.escape(name) + r"-(\d+)", each))]
    return f"{name}-{max(numbers, default=0) + 1}"


def exit_code(info: Any, job_id: str) -> int:
    """The code of a job's command. Raises Interrupted for a stopped job, RunError for one that Ray lost."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        raise Interrupted(f"the job {job_id} was stopped; submit again to continue")
    if info.driver_exit_code is None or info.driver_exit_code < 0:
        raise RunError(
            f"the job {job_id} ended without a word of its own ({short(info.message)}); submit again to continue"
        )
    return int(info.driver_exit_code)


def short(what: object) -> str:
    return " ".join(str(what).split())[:200]
