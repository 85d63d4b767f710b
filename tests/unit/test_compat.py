"""Each patch of `ftray/compat/deepspeed.py` is needed still; the test that fails says which one can go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

START = """
import os, sys, tempfile
import torch.distributed as dist
if sys.argv[1] == "patched":
    from ftray.compat.deepspeed import without_compiler
    without_compiler()
import deepspeed
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
print("started")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["patched", "as it is"])
def test_deepspeed_starts_on_cpu_without_a_compiler_only_when_patched(how: str, tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = subprocess.run(
        [sys.executable, "-c", START, how], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    if how == "patched":
        assert done.returncode == 0, done.stderr[-2000:]
        assert "started" in done.stdout
    else:
        assert done.returncode != 0, "DeepSpeed starts without a compiler by itself: remove without_compiler"
