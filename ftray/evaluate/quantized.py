"""Quantizes a run's exported model into `<run>/quantized/<kind>/` and measures the eval loss before and after.

Both losses are measured on the written files with the code of `ftray evaluate`. One Ray task does the work, on a GPU if the
cluster has one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import ray
import torch

from ftray import config, storage
from ftray.console import Console
from ftray.data.eval_examples import Document
from ftray.errors import RunError
from ftray.evaluate.plan import make_plan
from ftray.evaluate.score import score_documents
from ftray.model.load import absolute_base
from ftray.model.quantize import QuantizationResult, load_saved, quantize
from ftray.train.checkpoint.catalog import CheckpointRef, best_checkpoint
from ftray.train.export import fetch_part, whole_weights
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import Sft

Describe = Callable[[CheckpointRef, bool, QuantizationResult], Mapping[str, bytes]]


def export_quantized(
    run: config.RunConfig, run_dir: str, kind: str, console: Console, describe: Describe, step: int | None = None
) -> str:
    """Writes the quantized model unless it exists already. Needs a started Ray.

    Args:
        run: The run.
        run_dir: Directory of the run.
        kind: nf4, int8 or fp8.
        console: Output for the user.
        describe: Makes the files that describe the model's origin, by name.
        step: Step of the checkpoint; None selects the best one.

    Returns:
        URI of the quantized model.
    """
    checkpoint = best_checkpoint(run_dir, step)
    target = storage.join(run_dir, "quantized", kind)
    known = None if storage.verify_directory(target) else storage.read_manifest(target)
    if known is not None and known["meta"].get("step") == checkpoint.step:
        console.say(f"step {checkpoint.step} is already quantized to {kind}: {target}")
        console.say(str(QuantizationResult(**known["meta"]["quantized"])))
        return target
    examples = _eval_examples(run, run_dir)
    console.say(f"quantize: writing step {checkpoint.step} as {kind} to {target}")
    num_gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    task = ray.remote(_quantize).options(num_cpus=run.scale.cpus_per_worker, num_gpus=num_gpus, max_retries=0)
    done = ray.get(task.remote(run, checkpoint, whole_weights(run, run_dir), target, kind, examples, describe))
    console.say(str(done))
    return target


def _eval_examples(run: config.RunConfig, run_dir: str) -> list[list[Document]]:
    """The examples that `ftray evaluate` computes the loss over."""
    if run.data.eval is None:
        return []
    only_loss = run.evaluate.model_copy(update={"metrics": ["loss"], "few_shot": 0, "pairs": None})
    remote_run = run.model_copy(update={"model": absolute_base(run.model), "evaluate": only_loss})
    return make_plan(remote_run, run_dir).tasks["tuned"].examples


def _quantize(
    run: config.RunConfig,
    checkpoint: CheckpointRef,
    source: str,
    target: str,
    kind: str,
    examples: Sequence[Sequence[Document]],
    describe: Describe,
) -> QuantizationResult:
    """Runs in one process, because other machines do not see its local directory."""
    torch.set_num_threads(max(1, int(run.scale.cpus_per_worker)))
    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        before, after = fetch_part(source, Path(scratch)), Path(scratch, "after")
        done = quantize_scored(
            before, after, kind, run.train.precision, examples, run.data.max_seq_len, run.micro_batch_size
        )
        for name, text in describe(checkpoint, True, done).items():
            (after / name).write_bytes(text)
        storage.delete_tree(target)
        meta = {
            "step": checkpoint.step,
            "run": run.name,
            "base": run.model.base,
            **checkpoint.meta,
            "quantized": asdict(done),
        }
        if not storage.commit_directory(after, target, meta):
            raise RunError(f"{target} was written by another process; run the command again")
    return done


def quantize_scored(
    before: Path,
    after: Path,
    kind: str,
    precision: str,
    examples: Sequence[Sequence[Document]],
    max_seq_len: int,
    rows_at_once: int,
) -> QuantizationResult:
    """Quantizes a model from one local directory to another and measures the loss of both."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")

    def costs(directory: Path) -> tuple[float | None, int]:
        if not examples:
            return None, 0
        model = ObjectiveModel(load_saved(directory, precision, device), Sft()).eval()
        sums = score_documents(model, examples, max_seq_len, rows_at_once, 0, device).sum(0)
        return float(sums[0] / sums[2]), int(sums[2])

    (loss_before, num_trained_tokens) = costs(before)
    quantize(before, after, kind, precision, device)
    return QuantizationResult(
        kind, loss_before, costs(after)[0], num_trained_tokens, _weight_bytes(before), _weight_bytes(after)
    )


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
