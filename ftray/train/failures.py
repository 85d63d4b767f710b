"""Why a worker or a worker group ended, as one sentence with its remedy."""

from __future__ import annotations

import re

from ftray.errors import FtrayError, innermost

# What the other ranks raise when one of them is gone.
_COLLATERAL = re.compile(
    r"closed by peer|reset by peer|gloo|nccl(Remote|System)Error|communicator was aborted|Broken pipe|Socket Timeout",
    re.I,
)
_LOW_MEMORY = re.compile(r"low on memory|OutOfMemoryError|OOM-killed|out of memory", re.I)
_NODE = re.compile(r"node (has )?died|owner's node has crashed|node was (terminated|preempted)|node.* is dead", re.I)
_DISK = re.compile(r"OutOfDisk|No space left on device|local disk is full|disk.*full", re.I)
_DIED = (
    "ActorDiedError",
    "ActorUnavailableError",
    "OutOfMemoryError",
    "OwnerDiedError",
    "RayActorError",
    "WorkerCrashedError",
)


def out_of_memory(error: BaseException) -> str | None:
    """A message if a worker ran out of memory in its own step, which a retry will not fix; else None."""
    kind, text = type(error).__name__, str(error)
    is_torch = kind == "OutOfMemoryError" and type(error).__module__.startswith("torch")  # Ray's means another process
    device = "the GPU" if is_torch and "CUDA" in text.upper() else "the machine"
    if is_torch or kind == "MemoryError" or "DefaultCPUAllocator" in text:
        return (
            f"{device} has not enough memory for a step ({_shortened(text, 120)}); lower train.micro_batch_size or "
            "data.max_seq_len, raise deepspeed.zero_stage, or use more workers"
        )
    return None


def explain(error: BaseException) -> str:
    """Why Ray Train ended a group, by its error: the worker that died, or the one that failed first by itself."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return _sentence(innermost(getattr(error, "controller_failure", error)))
    ranks = sorted(failures)
    for rank in ranks:
        if death := _death(failures[rank]):
            return f"the worker of rank {rank} {death}"
    own = [rank for rank in ranks if not _COLLATERAL.search(str(innermost(failures[rank])))]
    return f"rank {(own or ranks)[0]}: {_sentence(innermost(failures[(own or ranks)[0]]))}"


def was_not_placed(error: BaseException | None) -> bool:
    """Whether a group did not start because others hold the resources that it needs."""
    return "StartupTimeout" in type(getattr(error, "controller_failure", error)).__name__


def _death(error: BaseException) -> str:
    """How a process ended; "" if it raised instead."""
    error = getattr(error, "health_check_failure", error)
    text = str(error)
    if type(error).__name__ not in _DIED:
        return ""
    if getattr(error, "preempted", False) or _NODE.search(text):
        return "was lost with its node"
    if "running low on memory" in text:
        address = re.search(r"\(IP: ([^,)]+)", text)
        return (
            f"was killed because its machine{f' {address[1]}' if address else ''} ran low on memory; lower "
            "train.micro_batch_size or data.max_seq_len, or use machines with more memory"
        )
    return "died without an error: its process was killed (by the kernel, out of memory, or by a user), or its node is gone"


def _sentence(error: BaseException) -> str:
    if isinstance(error, FtrayError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if _DISK.search(text):
        return (
            f"a disk of the cluster is full ({_shortened(text, 200)}); free space where Ray keeps its files (/tmp/ray)"
        )
    if _LOW_MEMORY.search(text):
        return (
            f"a machine ran low on memory ({_shortened(text, 200)}); use machines with more memory, or lower "
            "scale.cpus_per_worker"
        )
    return _shortened(text, 500)


def _shortened(text: str, length: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[:length]}…"
