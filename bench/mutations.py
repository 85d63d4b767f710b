"""Thirty mutations of the source, each of which `make test` must catch.

    python -m bench.mutations [--only data] [--keep-going]

Each mutation replaces one piece of code in a copy of the tree and runs the test modules that guard it, without the long
tests. A mutation survives if they pass. The list was written before the first run; see docs/testing.md for the result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """One change of the source. tests: the modules of tests/unit that guard it."""

    area: str
    what: str
    path: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation("data", "every epoch has the same chunk order", "data/order.py",
             "key(seed, epoch, source, *chunks[i])", "key(seed, source, *chunks[i])", "order"),
    Mutation("data", "the loss mask is off by one token", "data/packing.py", "where=mask[1:]", "where=mask[:-1]", "packing"),
    Mutation("data", "a record of exactly max_seq_len tokens is too long", "data/examples.py",
             "if num_tokens > rules.max_seq_len:", "if num_tokens >= rules.max_seq_len:", "clean tokenizer"),
    Mutation("data", "a chunk reads its first record twice", "data/sources.py",
             "at = max(chunk.start - 1, 0)", "at = max(chunk.start - 2, 0)", "sources"),
    Mutation("data", "sources are mixed in blocks instead of by due time", "data/order.py",
             "heapq.heapreplace(heap, (_due(counts[i], shares[i]), i))", "heapq.heapreplace(heap, (_due(1, shares[i]), i))",
             "order"),
    Mutation("train", "gradients are a mean over ranks instead of trained tokens", "train/trainer.py",
             "self.mesh.data_size / max(1.0, weight)", "self.mesh.data_size / max(1.0, weight + 1)", "trainer engines loss"),
    Mutation("train", "label smoothing leaves out the uniform part", "train/objectives/sft.py",
             "losses = losses - smoothing * wide.mean(dim=1)", "losses = losses - 0 * wide.mean(dim=1)", "loss"),
    Mutation("train", "an infinite loss is not a bad step", "train/trainer.py",
             "updated = math.isfinite(sums[0]) and not", "updated = not", "bad_steps"),
    Mutation("train", "warmup starts at zero", "train/optim/schedule.py", "peak * (step + 1) / num_warmup",
             "peak * step / num_warmup", "schedule"),
    Mutation("train", "documents of a sequence are one document", "train/batch.py", "np.flatnonzero(positions == 0)",
             "np.flatnonzero(positions == 0)[:1]", "loss packing_check"),
    Mutation("serve", "any key opens the endpoint", "serve/auth.py",
             "matches = [hmac.compare_digest(digest, known) for known in self._hashes]",
             "matches = [True for known in self._hashes]", "serve_protocol security_neighbour"),
    Mutation("serve", "tokens of an answer are not charged", "serve/rate_limit.py", "bucket.take(num_tokens)",
             "bucket.take(0)", "serve_policies"),
    Mutation("serve", "a name of another owner is replaced", "serve/registry.py", "if theirs is not None and theirs != owner:",
             "if theirs is None and theirs != owner:", "security_adapter_author publish adapter_cache"),
    Mutation("serve", "a returned canary still gets requests", "serve/routing.py",
             "weights.pop(self._canary.model, None)", "weights.get(self._canary.model, None)", "serve_policies"),
    Mutation("serve", "a caller can rate another caller's answer", "serve/auth.py",
             'return hmac.compare_digest(code.encode("utf-8", "replace"), _code(kind, nonce, caller).encode())',
             "return True", "security_api_client"),
    Mutation("engine", "a stop string is part of the answer", "engine/detokenizer.py", "return text[: min(starts)]",
             "return text", "engine detokenizer"),
    Mutation("engine", "top_p leaves out the token that crosses it", "engine/transformers/sampling.py",
             "ordered.cumsum(dim=-1) - ordered >= params.top_p", "ordered.cumsum(dim=-1) >= params.top_p", "engine"),
    Mutation("engine", "the seed has no effect", "engine/transformers/sampling.py", "_mix(params.seed or 0, position)",
             "_mix(0, position)", "engine"),
    Mutation("engine", "rank-stabilized adapters have the plain scale", "engine/adapters.py",
             'alpha / math.sqrt(rank) if tree.get("use_rslora") else alpha / rank', "alpha / rank", "adapters"),
    Mutation("engine", "half of a character is shown", "engine/detokenizer.py",
             "if len(text) <= len(before) or text.endswith(_HALF):", "if len(text) <= len(before):", "engine detokenizer"),
    Mutation("storage", "a commit does not look at sizes", "storage/commit.py", 'if there.get(path) != entry["size"]:',
             "if path not in there:", "storage checkpoint writer"),
    Mutation("storage", "a damaged manifest is accepted", "storage/commit.py", "if sum_ != _sum_of(manifest):",
             "if sum_ is None:", "storage run_directory checkpoint"),
    Mutation("storage", "a second committer replaces the manifest", "storage/commit.py",
             "return files.create_bytes(join(uri, MANIFEST), text.encode())",
             "return files.write_bytes(join(uri, MANIFEST), text.encode()) is None", "storage"),
    Mutation("storage", "a lease never grows stale", "storage/lease.py", 'or age_s > record["ttl_s"] or', "or",
             "storage lease"),
    Mutation("storage", "a symbolic link is followed when a tree is deleted", "storage/local.py", "is_symlink()",
             "is_mount()", "storage_links security_storage"),
    Mutation("config", "an unknown key is ignored", "config/base.py", 'extra="forbid"', 'extra="ignore"', "config"),
    Mutation("config", "a global batch that workers cannot divide is accepted", "config/run.py",
             "def _batch_divides(self) -> RunConfig:", "def _batch_divides(self) -> RunConfig:\n        return self\n",
             "config"),
    Mutation("config", "a key that appears twice is accepted", "config/loader.py", "if key in keys:",
             "if key in keys and not key:", "config security_run_file"),
    Mutation("config", "4-bit weights may be sharded", "config/constraints.py",
             '("deepspeed.zero_stage", (3,)),\n        "4-bit weights', '("deepspeed.zero_stage", ()),\n        "4-bit weights',
             "constraints config"),
    Mutation("config", "a secret in a run file is accepted", "config/run.py",
             "def _key_with_secret(tree: Any, key: str = \"\") -> str | None:",
             "def _key_with_secret(tree: Any, key: str = \"\") -> str | None:\n    return None\n",
             "console"),
]  # fmt: skip


def check(mutation: Mutation, tree: Path) -> str:
    """Applies a mutation, runs its tests and undoes it. Returns "caught", "SURVIVED" or the reason it could not run."""
    path = tree / "ftray" / mutation.path
    text = path.read_text()
    if mutation.old not in text:
        return f"NOT FOUND: {mutation.old}"
    modules = [f"tests/unit/test_{name}.py" for name in mutation.tests.split()]
    modules = [module for module in modules if (tree / module).exists()]
    path.write_text(text.replace(mutation.old, mutation.new, 1))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not long", *modules],
            cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        path.write_text(text)
    if done.returncode == 1 and " failed" in done.stdout + done.stderr:
        return "caught"
    return "SURVIVED" if done.returncode == 0 else f"ERROR: {(done.stdout + done.stderr)[-300:]}"


def main() -> int:
    """Runs the mutations; the exit code is 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one area: data, train, serve, engine, storage or config")
    only = parser.parse_args().only
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory, "tree")
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "site", ".*_cache", ".whl")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for mutation in MUTATIONS:
            if only in (None, mutation.area):
                began_s = time.monotonic()
                result = check(mutation, tree)
                survivors += result != "caught"
                print(f"{mutation.area:8} {result:9} {time.monotonic() - began_s:6.1f} s  {mutation.what}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
