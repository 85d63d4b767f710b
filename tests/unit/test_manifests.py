"""Manifests: what `ftray k8s render` writes and what k8s/ holds is what Kubernetes takes, and no more than it should."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray import config, storage
from ftray.cli import main
from ftray.cluster.instance_types import find_instance_type, plan_pods
from ftray.cluster.render import PARTS, kubernetes_name, render
from ftray.errors import ConfigError
from ftray.serve.deploy import build
from tests.manifests.check import Tree, problems, ray_pods, secrets_of, unrestricted

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
FILES = sorted((ROOT / "jobs").glob("*.yaml"))
JOBS = [path for path in FILES if config.load_run(path).storage.startswith("s3://")]
OVERLAYS = [K8S / "base", *sorted(path for path in (K8S / "overlays").iterdir())]


def documents(text: str) -> list[Any]:
    return [tree for tree in yaml.safe_load_all(text) if tree]


def is_manifest(tree: Any) -> bool:
    """Not a kustomization, a JSON patch (a list), a patch that deletes, or a run file."""
    return isinstance(tree, dict) and tree.get("kind") not in (None, "Kustomization") and "$patch" not in tree


def whole_manifests() -> dict[str, Tree]:
    """Every manifest under k8s/ and every one that is rendered for jobs/, by where it stands."""
    found = {}
    for path in sorted(K8S.rglob("*.yaml")):
        for number, tree in enumerate(documents(path.read_text())):
            if is_manifest(tree):
                found[f"{path.relative_to(ROOT)}#{number}"] = tree
    for path in JOBS:
        found |= {f"{path.name}/{part}": tree for part, tree in render(config.load_run(path), parts=PARTS).items()}
    return found


MANIFESTS = whole_manifests()


@pytest.mark.parametrize("where", MANIFESTS)
def test_every_manifest_is_what_kubernetes_and_kuberay_take(where: str) -> None:
    assert problems(MANIFESTS[where]) == []
    assert unrestricted(MANIFESTS[where]) == []


def branches(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all mappings whose keys a schema names; those of free keys (labels, data, limits) are left out."""
    free = {"labels", "annotations", "matchLabels", "data", "stringData", "limits", "requests", "nodeSelector"}
    free |= {"rayStartParams", "metadata"}  # RayJob.spec.metadata is free; the others are planted by hand below
    found = [path] if isinstance(node, dict) else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key not in free:
            found += branches(value, (*path, key))
    return found


@pytest.mark.parametrize("where", MANIFESTS)
def test_a_typo_is_caught_wherever_it_is_planted(where: str) -> None:
    missed = []
    places = branches(MANIFESTS[where])
    for path in places[:: max(1, len(places) // 12)]:  # a dozen of each: all would be thousands
        planted = copy.deepcopy(MANIFESTS[where])
        node: Any = planted
        for key in path:
            node = node[key]
        node["replcias"] = 1
        if not any("replcias" in line for line in problems(planted)):
            missed.append(path)
    assert missed == []
    planted = copy.deepcopy(MANIFESTS[where])
    planted["metadata"]["lables"] = {}
    assert any("lables" in line for line in problems(planted))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privileged", True),
        ("allowPrivilegeEscalation", True),
        ("readOnlyRootFilesystem", False),
        ("runAsNonRoot", False),
        ("runAsUser", 0),
        ("capabilities", {"add": ["SYS_ADMIN"]}),
        ("seccompProfile", {"type": "Unconfined"}),
    ],
)
def test_a_container_that_may_more_than_restricted_is_caught(key: str, value: Any) -> None:
    manifest = render(config.load_run(ROOT / "jobs/full-8b.yaml"), parts=("rayjob",))["rayjob"]
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["securityContext"] = {**head["securityContext"], key: value}
    assert any(line.endswith(f"ray-head: {key}") for line in unrestricted(manifest))


def test_every_pod_of_ray_asks_for_the_token_and_no_dashboard_is_public() -> None:
    for where, manifest in MANIFESTS.items():
        for template in ray_pods(manifest) if "redis" not in where else []:
            run = template["metadata"]["labels"]["ftray/run"]
            env = {v["name"]: v.get("value") for v in template["spec"]["containers"][0]["env"]}
            assert env["RAY_AUTH_MODE"] == "token", where
            assert secrets_of(template)["RAY_AUTH_TOKEN_PATH"] == f"{run}-ray-token", where
        text = json.dumps(manifest)
        assert "NodePort" not in text, where
        assert "LoadBalancer" not in text, where
        assert '"kind": "Ingress"' not in text, where
        if '"headGroupSpec"' in text:
            assert '"authOptions": {"mode": "token"' in text, where
            assert '"enableIngress"' not in text, where


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_patches_have_targets_and_every_file_is_used(overlay: Path) -> None:
    listing = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    named = {name for name in listing["resources"] if name.endswith(".yaml")}
    targets = targets_of(overlay)
    for patch in listing.get("patches", []):
        named.add(patch["path"])
        tree = yaml.safe_load((overlay / patch["path"]).read_text())
        wanted = patch.get("target") or {"kind": tree["kind"], "name": tree["metadata"]["name"]}
        assert (wanted["kind"], wanted["name"]) in targets, patch
    assert named | {"kustomization.yaml"} == {path.name for path in overlay.glob("*.yaml")}


def targets_of(overlay: Path) -> set[tuple[str, str]]:
    listing = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    found: set[tuple[str, str]] = set()
    for name in listing["resources"]:
        place = (overlay / name).resolve()
        if place.is_dir():
            found |= targets_of(place)
        else:
            found |= {(tree["kind"], tree["metadata"]["name"]) for tree in documents(place.read_text())}
    return found


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kustomize comes with kubectl, which is not here")
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_what_kustomize_builds_is_sound(overlay: Path) -> None:
    built = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    trees = documents(built.stdout)
    assert len(trees) > 10
    for tree in trees:
        assert problems(tree) == [], tree["metadata"]["name"]
        assert unrestricted(tree) == [], tree["metadata"]["name"]
        cluster_wide = tree["kind"] in ("Namespace", "ResourceFlavor", "ClusterQueue")
        assert cluster_wide or tree["metadata"]["namespace"] == "ftray"


def test_the_files_of_k8s_are_what_render_gives() -> None:
    files = runpy.run_path(str(K8S / "make.py"))["made"]()
    old = [str(path.relative_to(ROOT)) for path, text in files.items() if path.read_text() != text]
    assert old == [], "write them anew: python k8s/make.py"


def test_sixteen_a100_are_two_nodes_of_eight_that_fit_p4d() -> None:
    job = render(config.load_run(ROOT / "jobs/full-8b.yaml"), parts=("rayjob",))["rayjob"]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    size = pod["containers"][0]["resources"]["limits"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert (size["nvidia.com/gpu"], size["vpc.amazonaws.com/efa"]) == ("8", "4")
    assert 8 * 8 + 1 <= int(size["cpu"]) < 96
    memory, shm = (
        int(size["memory"].removesuffix("Gi")),
        int(pod["volumes"][-1]["emptyDir"]["sizeLimit"].removesuffix("Gi")),
    )
    assert 1000 < memory < 1152 * 0.95
    assert pod["volumes"][-1]["emptyDir"]["medium"] == "Memory"
    assert int(group["rayStartParams"]["object-store-memory"]) < shm * 2**30 <= memory / 4 * 2**30
    assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "p4d.24xlarge"}
    assert job["spec"]["backoffLimit"] == 3
    assert job["spec"]["entrypoint"] == "ftray run /etc/ftray/run.yaml"


@pytest.mark.parametrize(
    ("overrides", "pods", "gpus"),
    [
        (["scale.num_workers=12", "train.global_batch_size=12"], 2, 6),
        (["scale.num_workers=4"], 1, 4),
        (["scale.num_workers=1"], 1, 1),
        (["scale.num_workers={min: 8, max: 32}"], 4, 8),
    ],
)
def test_workers_are_spread_evenly_over_as_few_machines_as_hold_them(
    overrides: list[str], pods: int, gpus: int
) -> None:
    layout = plan_pods(config.load_run(ROOT / "jobs/full-8b.yaml", overrides), find_instance_type("A100"))
    assert (layout.pods, layout.gpus) == (pods, gpus)
    assert layout.cpus >= gpus * 8
    assert layout.cpus * 8 // gpus <= 96


@pytest.mark.parametrize(
    ("overrides", "machine", "message"),
    [
        (
            ["scale.cpus_per_worker=16"],
            None,
            "scale.cpus_per_worker 16: 8 workers need 128 CPUs, p4d.24xlarge has 92 for 8 of its 8 GPUs; lower it to 11, or "  # noqa: ISC004
            "name another --machine",
        ),
        (
            ["scale.accelerator=TPU"],
            None,
            "scale.accelerator TPU: no known machine has one; known are A100, H100, H200, L40S, A10G",
        ),
        ([], "p5.48xlarge", "--machine p5.48xlarge has 8 × H100, scale.accelerator is A100; correct one of them"),
        (["storage=runs"], None, "storage runs: pods share no disk; use a bucket: storage=s3://bucket/prefix"),
        (
            ["data.train.0.path=data/"],
            None,
            "data.train.0.path data/: pods share no disk; copy it to a bucket and use s3://…",
        ),
        (["model.base=./model"], None, "model.base ./model: pods share no disk; use a hub id (org/name)"),
    ],
)
def test_what_no_machine_or_pod_can_carry_is_refused_with_the_numbers(
    overrides: list[str], machine: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["k8s", "render", str(ROOT / "jobs/full-8b.yaml"), *overrides]
    assert main.main([*arguments, *(["--machine", machine] if machine else [])]) == 2
    assert capsys.readouterr().err == f"ftray: {message}\n"


def test_the_run_file_in_the_configmap_is_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ROOT / "jobs/lora-8b.yaml"
    assert main.main(["k8s", "render", str(source), "train.seed=7", "-o", str(tmp_path)]) == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [
        "configmap.yaml",
        "kustomization.yaml",
        "networkpolicy.yaml",
        "pdb-serve.yaml",
        "pdb-train.yaml",
        "rayjob.yaml",
        "rayservice.yaml",
        "serviceaccount.yaml",
    ]
    (tmp_path / "run.yaml").write_text(yaml.safe_load((tmp_path / "configmap.yaml").read_text())["data"]["run.yaml"])
    carried, run = config.load_run(tmp_path / "run.yaml"), config.load_run(source, ["train.seed=7"])
    assert (carried.config_hash, carried.scale, carried.directory) == (run.config_hash, run.scale, run.directory)
    assert carried.serve.host == "0.0.0.0"


def test_an_endpoint_is_deployed_from_the_run_file_and_not_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = render(config.load_run(ROOT / "jobs/lora-8b.yaml"), parts=("rayservice",))["rayservice"]
    (app,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert app["import_path"] == f"{build.__module__}:{build.__name__}"
    run = yaml.safe_load((ROOT / "jobs/lora-8b.yaml").read_text()) | {"storage": str(tmp_path / "runs")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    args = {"run": str(tmp_path / "run.yaml")}
    monkeypatch.delenv("FTRAY_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="FTRAY_API_KEY"):
        build(args)
    monkeypatch.setenv("FTRAY_API_KEY", "one,two")
    deployment = build(args)._bound_deployment
    (settings,) = deployment.init_args
    assert settings.model_dir == str(tmp_path / "runs/lora-8b/model/merged")
    assert settings.place == str(tmp_path / "runs/lora-8b")  # of feedback and events
    assert (settings.served.lineages, settings.served.references) == ({}, {})
    assert len(settings.key_hashes) == 2
    assert deployment.ray_actor_options["num_gpus"] == 1.0
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > deployment._deployment_config.graceful_shutdown_timeout_s


def test_a_deployed_endpoint_knows_its_lineage_and_what_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTRAY_API_KEY", "one")
    run_dir, reference = (
        tmp_path / "runs/lora-8b",
        {"prompt_tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9], "scripts": {"Latin": 1}},
    )
    (run_dir / "model/merged").mkdir(parents=True)
    (run_dir / "model/merged/config.json").write_text("{}")
    storage.commit_directory(run_dir / "model", str(run_dir / "model"), {"step": 3, "lineage": "0123456789abcdef"})
    storage.write_bytes(str(run_dir / "data/reference.json"), json.dumps(reference).encode())
    run = yaml.safe_load((ROOT / "jobs/lora-8b.yaml").read_text()) | {"storage": str(tmp_path / "runs")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (settings,) = build({"run": str(tmp_path / "run.yaml")})._bound_deployment.init_args
    assert settings.served.lineages == {"lora-8b": "0123456789abcdef"}
    assert settings.served.references == {"lora-8b": reference}


def test_names_fit_kubernetes_and_differ_where_runs_differ() -> None:
    assert kubernetes_name("llama3-8b") == "llama3-8b"
    names = ["Llama_3.1", "llama-3.1", "llama-3-1", "a" * 63, "a" * 62 + "b", "9.", "run" * 20]
    made = [kubernetes_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(len(name) <= 40 and name.strip("-") == name and name == name.lower() for name in made)
