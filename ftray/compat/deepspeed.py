"""Every change that ftray makes to a dependency, each with its reason and the test that tells when it can go."""

from __future__ import annotations


def deepspeed_without_compiler() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collectives on CPU.

    Reason: deepspeed 0.19's TorchBackend builds the op `deepspeed_shm_comm` with a C++ compiler as soon as a CPU
    process group is set up, and fails where there is none. It is a speed-up of collectives inside one host only.
    Test: tests/unit/test_compat.py. Upstream: deepspeed/comm/torch.py, build_shm_op.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
