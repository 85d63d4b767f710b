"""Attacker: an adapter's author, who gives files to be served, and publishes under names that others use.

Every hostile file is refused with a sentence before a tensor is read; names belong to who published them first; with
`serve.trusted_keys` only what a trusted key signed is served.
"""

import asyncio
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftray.config import ServeConfig
from ftray.engine.adapters import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, read_adapter_files, read_settings
from ftray.engine.transformers.mixed_lora import MixedLora
from ftray.errors import CheckpointError, ConfigError, ModelError
from ftray.serve.model_files import local_adapter
from ftray.serve.registry import list_published, publish, registry_of, remove, scan
from ftray.serve.routes import build_api
from ftray.serve.signing import Signer
from tests.unit.test_adapter_cache import META, HoldingEngine, life, put, served, write_model
from tests.unit.test_adapters import A, B, change_config, change_weights, write_adapter
from tests.unit.test_engine import tiny_model
from tests.unit.test_publish import run_file, typed
from tests.unit.test_serve_protocol import call

__all__ = ["run_file"]  # a fixture


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    for file in original.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="module")
def lora() -> MixedLora:
    return MixedLora(tiny_model())


def config_text(text: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / "adapter_config.json").write_bytes(text)


def config(**changes: Any) -> Callable[[Path], Any]:
    return lambda directory: change_config(directory, **changes)


def header(change: Callable[[dict[str, Any]], Any], more: bytes = b"") -> Callable[[Path], Any]:
    """A weights file with another header, and perhaps more bytes at its end."""

    def make(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        tree = json.loads(data[8 : 8 + length])
        changed = change(tree)
        text = changed if isinstance(changed, bytes) else json.dumps(tree).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + more)

    return make


def weights(data: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / "adapter_model.safetensors").write_bytes(data)


def first(tree: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in tree.items() if name != "__metadata__")


def replaced_by(make: Callable[[Path], Any], name: str) -> Callable[[Path], Any]:
    def work(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return work


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty config": (config_text(b""), "not a valid adapter config"),
    "config of a list": (config_text(b"[]"), "not a valid adapter config"),
    "config nested deeply": (config_text(b'{"r": ' + b"[" * 100_000), "nested more than"),
    "config of megabytes": (config_text(b'{"r": "' + b"x" * MAX_CONFIG_BYTES + b'"}'), "at most"),
    "rank infinite": (config_text(b'{"peft_type": "LORA", "r": 1e999, "lora_alpha": 1}'), "too large"),
    "rank NaN": (config_text(b'{"peft_type": "LORA", "r": NaN, "lora_alpha": 1}'), "NaN"),
    "rank of 5000 digits": (config_text(b'{"peft_type": "LORA", "lora_alpha": 1, "r": ' + b"9" * 5000 + b"}"), "digits"),
    "rank of 300 digits": (config(r=10**300), "out of bounds"),
    "rank huge": (config(r=2**31), "out of bounds"),
    "rank 0": (config(r=0), "out of bounds"),
    "rank negative": (config(r=-4), "out of bounds"),
    "rank text": (config(r="4"), "r is '4'"),
    "rank true": (config(r=True), "r is 'True'"),
    "rank a fraction": (config(r=4.5), "r is '4.5'"),
    "alpha text": (config(lora_alpha="1"), "lora_alpha"),
    "alpha huge": (config(lora_alpha=1e300), "out of bounds"),
    "alpha null": (config(lora_alpha=None), "lora_alpha"),
    "kind a list": (config(peft_type=["LORA"]), "peft_type"),
    "kind long": (config(peft_type="x" * 10_000), "only LoRA"),
    "base a tree": (config(base_model_name_or_path={"a": 1}), "base_model_name_or_path"),
    "rslora text": (config(use_rslora="no"), "use_rslora"),
    "dora a number": (config(use_dora=1), "use_dora"),
    "rank pattern": (config(rank_pattern={".*": 10**9}), "rank_pattern"),
    "layers replicated": (config(layer_replication=[[0, 10**6]]), "layer_replication"),
    "tokens": (config(trainable_token_indices=[1]), "trainable_token_indices"),
    "weights empty": (weights(b""), "not a valid safetensors file"),
    "weights of a pickle": (weights(b"\x80\x04cos\nsystem\n" * 10), "not a valid safetensors file"),
    "header longer than the file": (weights(struct.pack("<Q", 1 << 20) + b"{}"), "not a valid safetensors file"),
    "header of exabytes": (weights(struct.pack("<Q", 2**63) + b"{}"), f"2 to {MAX_HEADER_BYTES}"),
    "header of length 0": (weights(struct.pack("<Q", 0)), "not a valid safetensors file"),
    "header a list": (header(lambda _: b"[]"), "not a valid safetensors file"),
    "header nested deeply": (header(lambda _: b'{"a": ' + b"[" * 100_000), "nested more than"),
    "header not UTF-8": (header(lambda _: b'{"\xff": 1}'), "UTF-8"),
    "a tensor twice": (header(lambda t: json.dumps(t).encode()[:-1] + b"," + json.dumps(t).encode()[1:]), "twice"),
    "an entry a number": (header(lambda t: t.update(x=3)), "impossible entry"),
    "dtype unknown": (header(lambda t: first(t).update(dtype="PICKLE")), "unknown dtype"),
    "dtype a list": (header(lambda t: first(t).update(dtype=["F32"])), "unknown dtype"),
    "shape text": (header(lambda t: first(t).update(shape="44")), "impossible shape"),
    "shape negative": (header(lambda t: first(t).update(shape=[-4, 64])), "impossible shape"),
    "shape true": (header(lambda t: first(t).update(shape=[True, 64])), "impossible shape"),
    "shape that overflows": (header(lambda t: first(t).update(shape=[2**40, 2**40])), "shape and dtype"),
    "shape of thousands": (header(lambda t: first(t).update(shape=[1] * 5000)), "impossible shape"),
    "offsets swapped": (header(lambda t: first(t)["data_offsets"].reverse()), "shape and dtype"),
    "offsets negative": (header(lambda t: first(t).update(data_offsets=[-1024, 0])), "impossible offsets"),
    "offsets of one": (header(lambda t: first(t).update(data_offsets=[0])), "impossible offsets"),
    "tensors on each other": (header(lambda t: t.update({A: t[B], B: t[B]})), "overlap"),
    "bytes behind the tensors": (header(lambda _: None, b"\0" * 64), "damaged"),
    "bytes missing": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-64]), "damaged"),
    "whole numbers": (lambda d: change_weights(d, lambda t: t.update({k: v.to(torch.int32) for k, v in t.items()})), "I32"),
    "a name with ../": (lambda d: change_weights(d, lambda t: t.update({"../../x": torch.zeros(1)})), "not part of LoRA"),
    "a name of kilobytes": (lambda d: change_weights(d, lambda t: t.update({"x" * 5000: torch.zeros(1)})), "impossible entry"),
    "config a directory": (replaced_by(Path.mkdir, CONFIG), "not a regular file"),
    "config a pipe": (replaced_by(os.mkfifo, CONFIG), "not a regular file"),
    "weights without end": (replaced_by(lambda p: p.symlink_to("/dev/zero"), WEIGHTS), "not a regular file"),
    "weights a link to nowhere": (replaced_by(lambda p: p.symlink_to("/nowhere"), WEIGHTS), "not a regular file"),
    "weights missing": (lambda d: (d / WEIGHTS).unlink(), "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_adapter_is_one_sentence(adapter: Path, lora: MixedLora, case: str) -> None:
    break_it, message = HOSTILE[case]
    break_it(adapter)
    with pytest.raises(ModelError) as refused:
        lora.load("evil", adapter)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 600
    assert lora.names() == []


@pytest.mark.parametrize(
    "harmless",
    [
        {"auto_mapping": {"base_model_class": "os", "parent_library": "os"}},
        {"base_model_name_or_path": "../../../etc/passwd"},
        {"base_model_name_or_path": "s3://elsewhere/x"},
        {"target_modules": "(a+)+$" * 50},
        {"exclude_modules": ".*" * 1000},
        {"eva_config": {"x": 1}},
        {"__class__": "x"},
    ],
)
def test_fields_that_other_loaders_act_on_change_nothing_here(
    adapter: Path, lora: MixedLora, harmless: dict[str, Any]
) -> None:
    """No regular expression of an author is run, no module of theirs imported, no path of theirs opened."""
    change_config(adapter, **harmless)
    lora.load("odd", adapter)
    assert lora.names() == ["odd"]
    lora.unload("odd")


def test_a_magnitude_that_is_not_finite_is_refused(tmp_path: Path, lora: MixedLora) -> None:
    directory = write_adapter(tmp_path / "d", r=2, lora_alpha=4, target_modules=["q_proj"], use_dora=True)
    change_weights(directory, lambda t: [v.fill_(float("inf")) for k, v in t.items() if "magnitude" in k])
    with pytest.raises(ModelError, match="not finite"):
        lora.load("evil", directory)


def test_a_good_adapter_is_read_as_before(adapter: Path) -> None:
    settings, shapes = read_adapter_files(adapter)
    assert (settings.rank, settings.scaling) == (4, 4.0)
    assert shapes == {name: list(tensor.shape) for name, tensor in load_file(adapter / WEIGHTS).items()}


def test_an_adapters_files_that_raise_a_surprise_are_a_503_and_no_crash(tmp_path: Path) -> None:
    put(tmp_path, "evil")
    put(tmp_path, "polite")

    class Surprised(HoldingEngine):
        tries = 0

        async def load_adapter(self, name: str, directory: str) -> None:
            if "evil" in name:
                self.tries += 1
                raise OverflowError("int too large to convert to float")
            await super().load_adapter(name, directory)

    async def work() -> None:
        engine = Surprised()
        app = build_api(engine, served(tmp_path), max_tokens=5)
        async with life(app):
            for _ in range(3):
                answer = await call(app, "/v1/completions", {"model": "small:evil", "prompt": "x"})
                assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
            assert engine.tries == 1  # its work is not done again for each request
            assert (await call(app, "/v1/completions", {"model": "small:polite", "prompt": "x"})).status == 200

    asyncio.run(work())


@pytest.mark.parametrize("files", [5, [], {}, {"adapter_config.json": 5}, {"adapter_config.json": {"sha256": 7}}])
def test_a_manifest_of_an_adapters_directory_may_hold_anything(tmp_path: Path, files: Any) -> None:
    source = Path(write_model(tmp_path / "m", "x"))
    import hashlib

    tree = {"files": files, "meta": {}}
    text = json.dumps(tree, sort_keys=True)
    (source / "manifest.json").write_text(json.dumps({**tree, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    with pytest.raises((ModelError, CheckpointError), match=r"is damaged|missing or damaged"):
        local_adapter(str(source))


def test_weights_beyond_the_bound_are_not_served(tmp_path: Path) -> None:
    put(tmp_path, "polite")
    found = scan(registry_of(str(tmp_path), "org/small"), max_adapter_bytes=10)
    assert (dict(found.adapters), [one.kind for one in found.rejected.values()]) == ({}, ["size"])


# Names and owners


def test_a_name_is_not_taken_from_its_owner(tmp_path: Path) -> None:
    registry = registry_of(str(tmp_path), "org/small")
    sources = [write_model(tmp_path / f"m{i}", f"x{i}") for i in range(3)]

    def as_(owner: str, i: int, **options: Any) -> Any:
        return publish(registry, "polite", sources[i], f"{sources[i]}/merged", META, owner=owner, **options)

    assert as_("alice", 0)[0].meta["owner"] == "alice"
    for refused in (lambda: as_("bob", 1), lambda: remove(registry, "polite", owner="bob")):
        with pytest.raises(ConfigError, match=r"polite is published by 'alice', and you are 'bob'.*--take-over"):
            refused()
    assert list_published(registry)["polite"].meta["owner"] == "alice"
    assert as_("alice", 1)[0].version.startswith("0002-")
    assert as_("bob", 2, take_over=True)[0].meta["owner"] == "bob"
    with pytest.raises(ConfigError, match="published by 'bob'"):
        as_("alice", 0)
    assert remove(registry, "polite", owner="bob") == 3


def test_the_command_line_records_the_owner_and_lists_what_is_there(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTRAY_OWNER", "team-a")
    assert typed(capsys, "publish", run_file)[0] == 0
    monkeypatch.setenv("FTRAY_OWNER", "team-b")
    code, said = typed(capsys, "publish", run_file, "--remove")
    assert (code, "published by 'team-a', and you are 'team-b'" in said) == (2, True)
    bad = tmp_path / "runs/published/base/evil/0001-0123456789ab/manifest.json"
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    code, said = typed(capsys, "publish", run_file, "--list")
    assert code == 0
    assert "base:polite  version 0001-" in said
    assert "owner team-a" in said
    assert f"warning: {bad.parent} is not served: its manifest is not valid JSON" in said
    assert typed(capsys, "publish", run_file, "--remove", "--owner", "team-a")[0] == 0


# Signatures


def make_key(path: Path, kind: str = "ed25519") -> Path:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key: Any = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def put_signed(tmp_path: Path, name: str, signer: Signer | None, reply: str | None = None) -> Path:
    source = write_model(tmp_path / f"runs/{name}-{reply}", reply or name)
    registry = registry_of(str(tmp_path), "org/small")
    return Path(publish(registry, name, source, f"{source}/merged", META, owner="me", signer=signer)[0].uri)


def test_only_what_a_trusted_key_signed_is_served(tmp_path: Path) -> None:
    ours, theirs = Signer(str(make_key(tmp_path / "ours.pem"))), Signer(str(make_key(tmp_path / "theirs.pem")))
    put_signed(tmp_path, "good", ours)
    put_signed(tmp_path, "unsigned", None)
    put_signed(tmp_path, "foreign", theirs)
    told = replace(served(tmp_path), trusted_keys=(ours.public_key,))

    async def work() -> None:
        app = build_api(HoldingEngine(), told, max_tokens=5)
        async with life(app):
            listed = (await call(app, "/v1/models")).json["data"]
            assert [card["id"] for card in listed] == ["small", "small:good"]
            answer = await call(app, "/v1/completions", {"model": "small:good", "prompt": "x"})
            assert answer.json["choices"][0]["text"] == "good"
            figures = b"".join((await call(app, "/metrics")).pieces).decode()
            assert 'ftray_adapters_rejected_total{reason="signature"} 2.0' in figures

    asyncio.run(work())
    registry = registry_of(str(tmp_path), "org/small")
    assert sorted(list_published(registry)) == ["foreign", "good", "unsigned"]  # without trusted keys
    assert sorted(list_published(registry, [ours.public_key, theirs.public_key])) == ["foreign", "good"]


@pytest.mark.parametrize("what", ["name", "version", "meta", "files", "signature", "key"])
def test_a_signed_entry_can_be_neither_changed_nor_moved(tmp_path: Path, what: str) -> None:
    from tests.unit.test_security_storage import whole

    signer = Signer(str(make_key(tmp_path / "ours.pem")))
    uri = put_signed(tmp_path, "good", signer)
    registry = registry_of(str(tmp_path), "org/small")
    assert list(list_published(registry, [signer.public_key])) == ["good"]
    place = Path(registry)
    if what == "name":
        (place / "good").rename(place / "admin")
    elif what == "version":  # an old version offered again as the newest
        uri.rename(uri.with_name(uri.name.replace("0001-", "0002-")))
    else:
        changes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "meta": lambda tree: tree["meta"].update(step=4),
            "files": lambda tree: tree["files"]["adapter_config.json"].update(size=7),
            "signature": lambda tree: tree["meta"]["signature"].update(value="AAAA"),
            "key": lambda tree: tree["meta"]["signature"].update(key="ed25519:" + "A" * 43 + "="),
        }
        (uri / "manifest.json").write_bytes(whole(changes[what])(uri))
    found = scan(registry, trusted=[signer.public_key])
    assert (dict(found.adapters), [one.kind for one in found.rejected.values()]) == ({}, ["signature"])


def test_a_signed_name_is_replaced_only_with_its_key(tmp_path: Path) -> None:
    ours, theirs = Signer(str(make_key(tmp_path / "ours.pem"))), Signer(str(make_key(tmp_path / "theirs.pem")))
    put_signed(tmp_path, "good", ours)
    for signer in (None, theirs):
        with pytest.raises(ConfigError, match="signed with the key ed25519:"):
            put_signed(tmp_path, "good", signer, "other" if signer is None else "another")
    assert put_signed(tmp_path, "good", ours, "anew").name.startswith("0002-")


def test_the_same_files_are_published_again_to_be_signed(tmp_path: Path) -> None:
    signer = Signer(str(make_key(tmp_path / "ours.pem")))
    source = write_model(tmp_path / "m", "x")
    registry = registry_of(str(tmp_path), "org/small")
    first, _ = publish(registry, "x", source, f"{source}/merged", META)
    second, is_new = publish(registry, "x", source, f"{source}/merged", META, signer=signer)
    assert (is_new, second.version.split("-")[0]) == (True, "0002")
    assert first.version.split("-")[1] == second.version.split("-")[1]
    assert publish(registry, "x", source, f"{source}/merged", META, signer=signer)[1] is False


def test_a_key_that_can_not_sign_is_a_sentence(tmp_path: Path) -> None:
    good = make_key(tmp_path / "key.pem")
    good.chmod(0o644)
    with pytest.raises(ConfigError, match=r"can be read by other users; run: chmod 600"):
        Signer(str(good))
    with pytest.raises(ConfigError, match="cannot be read"):
        Signer(str(tmp_path / "nowhere.pem"))
    for text in (b"", b"no PEM", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        wrong = tmp_path / "wrong.pem"
        wrong.touch(mode=0o600)
        wrong.write_bytes(text)
        with pytest.raises(ConfigError, match="is not an Ed25519 private key"):
            Signer(str(wrong))
    with pytest.raises(ConfigError, match="is not an Ed25519 private key"):
        Signer(str(make_key(tmp_path / "ec.pem", "ec")))
    with pytest.raises(ConfigError, match="is not a file"):
        Signer(str(tmp_path))


@pytest.mark.parametrize(
    "key", ["", "ed25519:", "ed25519:AAAA", "x" * 44, "ed25519:" + "!" * 44, "-----BEGIN PUBLIC KEY"]
)
def test_a_trusted_key_that_is_none_is_refused_in_the_run_file(key: str) -> None:
    with pytest.raises(ValueError, match="is not a public key"):
        ServeConfig.model_validate({"trusted_keys": [key]})


def test_publish_signs_as_typed_and_never_shows_the_key(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = make_key(tmp_path / "org.pem")
    code, said = typed(capsys, "publish", run_file, "--sign", str(key))
    assert code == 0
    public = Signer(str(key)).public_key
    assert f"serve.trusted_keys=[{public}]" in said
    private = "".join(key.read_text().splitlines()[1:-1])
    assert private not in said
    (manifest,) = (tmp_path / "runs/published/base/polite").glob("*/manifest.json")
    assert private not in manifest.read_text()
    assert json.loads(manifest.read_text())["meta"]["signature"]["key"] == public
    code, said = typed(capsys, "publish", run_file, "--list", f"serve.trusted_keys=[{public}]")
    assert (code, ", signed" in said) == (0, True)
    code, said = typed(capsys, "publish", run_file, "--sign", str(tmp_path / "x"))
    assert (code, "--sign" in said) == (2, True)


def test_reading_an_adapters_config_imports_nothing_that_it_names() -> None:
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "auto_mapping": {"parent_library": "antigravity"}}
    code = (
        f"import sys; from ftray.engine.adapters import read_settings; read_settings({json.dumps(settings).encode()!r}, 'x');"
        "print('antigravity' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_config_alone_needs_no_base() -> None:
    assert read_settings(b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16}', "x").scaling == 2.0
