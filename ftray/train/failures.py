"""What ended a worker or a group of workers, in one sentence with its remedy. Knows exceptions; nothing of runs."""

from __future__ import annotations

import re

from ftray.errors import FtrayError, innermost

# What the other ranks say when one of them is gone: true, and of no help.
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
    """A sentence if a worker had not enough memory for its own step, else None: trying again would end the same way."""
    kind, text = type(error).__name__, str(error)
    torchs = kind == "OutOfMemoryError" and type(error).__module__.startswith("torch")  # Ray's own is another's end
    where = "the GPU" if torchs and "CUDA" in text.upper() else "the machine"
    if torchs or kind == "MemoryError" or "DefaultCPUAllocator" in text:
        return (
            f"{where} has not enough memory for a step ({_plain(text, 120)}); lower train.micro_batch_size or "
            "data.max_seq_len, raise deepspeed.zero_stage, or use more workers"
        )
    return None


def explain(error: BaseException) -> str:
    """Why Ray Train ended a group, from what it raised: the worker that died, or that failed first by itself."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return _sentence(innermost(getattr(error, "controller_failure", error)))
    ranks = sorted(failures)
    for rank in ranks:
        if died := _death(failures[rank]):
            return f"the worker of rank {rank} {died}"
    own = [rank for rank in ranks if not _COLLATERAL.search(str(innermost(failures[rank])))]
    return f"rank {(own or ranks)[0]}: {_sentence(innermost(failures[(own or ranks)[0]]))}"


def had_no_room(error: BaseException | None) -> bool:
    """Whether a group did not start because others hold what it needs."""
    return "StartupTimeout" in type(getattr(error, "controller_failure", error)).__name__


def _death(error: BaseException) -> str:
    """How a process went away; "" if it did not, but raised."""
    error = getattr(error, "health_check_failure", error)
    text = str(error)
    if type(error).__name__ not in _DIED:
        return ""
    if getattr(error, "preempted", False) or _NODE.search(text):
        return "went away with its node"
    if "running low on memory" in text:
        place = re.search(r"\(IP: ([^,)]+)", text)
        return (
            f"was ended because its machine{f' {place[1]}' if place else ''} ran low on memory; lower "
            "train.micro_batch_size or data.max_seq_len, or use machines with more memory"
        )
    return "died without a word: its process was killed (by the kernel, out of memory, or by somebody), or its node is gone"


def _sentence(error: BaseException) -> str:
    if isinstance(error, FtrayError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if _DISK.search(text):
        return (
            f"a disk of the cluster is full ({_plain(text, 200)}); free some space where Ray keeps its files (/tmp/ray)"
        )
    if _LOW_MEMORY.search(text):
        return (
            f"a machine ran low on memory ({_plain(text, 200)}); use machines with more, or lower scale.cpus_per_worker"
        )
    return _plain(text, 500)


def _plain(text: str, length: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[:length]}…"
