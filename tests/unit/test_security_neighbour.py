"""A neighbour on the cluster: another run of the namespace, or whoever reads a pod's environment or a Secret."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray import config
from ftray.cluster.render import PARTS, render
from ftray.errors import ConfigError
from ftray.serve.auth import AuthMiddleware, read_key_hashes
from tests.manifests.check import ray_pods, secrets_of

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"


@pytest.mark.parametrize("file", ["lora-8b.yaml", "full-8b.yaml"])
def test_a_pod_gets_only_the_secrets_that_its_role_needs(file: str) -> None:
    manifests = render(config.load_run(ROOT / "jobs" / file, ["name=one"]), parts=PARTS)
    ray, keys, hub = (
        {"RAY_AUTH_TOKEN_PATH": "one-ray-token"},
        {"FTRAY_API_KEY_FILE": "one-api-keys"},
        {"HF_TOKEN_PATH": "one-hub-token"},
    )
    wanted = {"train": ray | hub, "cluster": ray | hub, "submit": ray, "serve": ray | keys}
    pods = [pod for manifest in manifests.values() for pod in ray_pods(manifest)]
    assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods} == set(wanted)
    for pod in pods:
        assert secrets_of(pod) == wanted[pod["metadata"]["labels"]["app.kubernetes.io/component"]]


def test_a_run_without_a_hub_model_gets_no_hub_token() -> None:
    job = render(config.load_run(K8S / "demo.yaml"), parts=("rayjob",))["rayjob"]
    assert {name for pod in ray_pods(job) for name in secrets_of(pod)} == {"RAY_AUTH_TOKEN_PATH"}


def names_in(node: Any) -> set[str]:
    """Every name of a Secret, service account, ConfigMap or object in a manifest."""
    keys = {"secretName", "serviceAccountName", "name"}
    if isinstance(node, list):
        return set().union(*map(names_in, node)) if node else set()
    if not isinstance(node, dict):
        return set()
    named = {value for key, value in node.items() if key in keys and isinstance(value, str)}
    return named.union(*map(names_in, node.values())) if node else named


def test_two_runs_share_no_token_secret_account_or_policy() -> None:
    one, two = (
        render(config.load_run(ROOT / "jobs/lora-8b.yaml", [f"name={name}"]), parts=PARTS) for name in ("one", "two")
    )
    for part in PARTS:
        assert one[part]["metadata"]["name"] != two[part]["metadata"]["name"] or part in ("rayjob", "rayservice"), part
        for pod_one, pod_two in zip(ray_pods(one[part]), ray_pods(two[part]), strict=True):
            assert not set(secrets_of(pod_one).values()) & set(secrets_of(pod_two).values()), part
            assert pod_one["spec"]["serviceAccountName"] != pod_two["spec"]["serviceAccountName"], part
        shared = {name for name in names_in(one[part]) & names_in(two[part]) if "one" in name or "two" in name}
        assert shared == set(), part
    policy = one["networkpolicy"]["spec"]
    selected = {"matchLabels": {"app.kubernetes.io/part-of": "ftray", "ftray/run": "one"}}
    assert policy["podSelector"] == selected
    assert policy["ingress"] == [{"from": [{"podSelector": selected}]}]
    assert policy["egress"] == [{"to": [{"podSelector": selected}]}]
    for budget, role in (("pdb-train", "train"), ("pdb-serve", "serve")):
        labels = one[budget]["spec"]["selector"]["matchLabels"]
        assert (labels["ftray/run"], labels["app.kubernetes.io/component"]) == ("one", role)


def test_pods_may_reach_dns_and_tls_and_only_a_run_reaches_its_own_pods() -> None:
    policies = {
        t["metadata"]["name"]: t["spec"] for t in yaml.safe_load_all((K8S / "base/networkpolicies.yaml").read_text())
    }
    assert policies["ftray-deny"] == {
        "podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "ftray"}},
        "policyTypes": ["Ingress", "Egress"],
    }
    out = {name for name, spec in policies.items() if spec.get("egress")}
    assert out == {"ftray-dns", "ftray-s3", "ftray-autoscaler"}
    (rule,) = policies["ftray-s3"]["egress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 443}]
    assert "169.254.0.0/16" in rule["to"][0]["ipBlock"]["except"]
    for name, spec in policies.items():
        for rule in spec.get("ingress", []) + spec.get("egress", []):
            peers = rule.get("from", rule.get("to"))
            assert peers, name
            # A peer without a namespace would be a pod of this namespace, of any run.
            assert all("namespaceSelector" in peer or "ipBlock" in peer for peer in peers), name


HASH = hashlib.sha256(b"secret-key").hexdigest()


@pytest.mark.parametrize("entry", ["secret-key", f"sha256:{HASH}", f"sha256:{HASH.upper()}"])
def test_a_key_file_may_hold_hashes_instead_of_keys(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(f"{entry}\n")
    monkeypatch.delenv("FTRAY_API_KEY", raising=False)
    monkeypatch.setenv("FTRAY_API_KEY_FILE", str(tmp_path / "keys"))
    assert read_key_hashes("0.0.0.0") == (HASH,)


@pytest.mark.parametrize("entry", ["sha256:", f"sha256:{HASH[:-1]}", f"sha256:{HASH}0", f"sha256:{HASH[:-1]}g"])
def test_a_malformed_hash_is_refused_and_not_taken_for_a_key(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(f"good\n{entry}\n")
    monkeypatch.setenv("FTRAY_API_KEY_FILE", str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match="malformed sha256: entry") as caught:
        read_key_hashes("0.0.0.0")
    assert HASH[:20] not in str(caught.value)


async def _status(headers: list[tuple[bytes, bytes]]) -> int:
    sent: list[dict[str, Any]] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/models", "headers": headers}
    await AuthMiddleware(app, (HASH,))(scope, None, send)
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("key", "status"),
    [(b"secret-key", 200), (HASH.encode(), 401), (f"sha256:{HASH}".encode(), 401), (b"", 401)],
)
def test_whoever_reads_the_hash_cannot_use_it_as_a_key(key: bytes, status: int) -> None:
    import asyncio

    assert asyncio.run(_status([(b"authorization", b"Bearer " + key)])) == status
