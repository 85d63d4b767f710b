"""Model cards (MODEL_CARD.md) in the format of the Hugging Face hub, with lineage.json beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ftray import config
from ftray.console import printable
from ftray.driver.lineage import DECIDING, read_lineage
from ftray.evaluate.report import counted, figure_rows
from ftray.evaluate.results import Comparison, read_results
from ftray.model.quantize import KINDS, QuantizationResult
from ftray.redact import redacted, redacted_tree
from ftray.train.checkpoint.catalog import CheckpointRef

CARD, LINEAGE = "MODEL_CARD.md", "lineage.json"
HOW = {
    "full": "all weights",
    "lora": "low-rank adapters (LoRA)",
    "qlora": "low-rank adapters on a 4-bit base (QLoRA)",
    "prompt-tuning": "virtual tokens (prompt tuning)",
}


def described(
    run: config.RunConfig,
    run_dir: str,
    checkpoint: CheckpointRef,
    is_whole: bool = False,
    quantized: QuantizationResult | None = None,
) -> dict[str, bytes]:
    """The files of an exported model. is_whole: merged weights. quantized: the loss in quality, if quantized."""
    lineage = read_lineage(run_dir)
    comparison = read_results(run_dir)
    if comparison is not None and comparison.step != checkpoint.step:
        comparison = None
    is_whole = is_whole or run.method.type == "full"
    files = {CARD: render_card(run, checkpoint, lineage, comparison, is_whole, quantized).encode()}
    if lineage is not None:
        tree = {**lineage, "run": run.name, "step": checkpoint.step, "config": run.identity()}
        tree |= {"quantized": asdict(quantized)} if quantized is not None else {}
        files[LINEAGE] = json.dumps(redacted_tree(tree), indent=1).encode()
    return files


def render_card(
    run: config.RunConfig,
    checkpoint: CheckpointRef,
    lineage: Mapping[str, Any] | None,
    comparison: Comparison | None,
    is_whole: bool,
    quantized: QuantizationResult | None = None,
) -> str:
    """Renders the card: YAML front matter and Markdown."""
    front = yaml.safe_dump(_metadata(run, comparison, is_whole, quantized), sort_keys=False, allow_unicode=True)
    parts = [
        f"# {escaped(run.name)}",
        f"{code_span(run.model.base)}, fine-tuned with ftray: {HOW[run.method.type]}, step {checkpoint.step}.",
        "The license and limitations of the base model apply to this model too.",
        "## Training",
        _table(["", ""], _training(run, checkpoint)),
        "## Data",
        _table(
            ["source", "weight", "format"],
            [[code_span(s.path), _or_dash(s.weight), escaped(s.format)] for s in run.data.train],
        ),
    ]
    if comparison is not None:
        head, rows = figure_rows(comparison)
        cells = [[escaped(cell) for cell in row] for row in rows]
        parts += ["## Evaluation", _table(head, cells), *map(escaped, (counted(comparison), *comparison.verdict))]
    if quantized is not None:
        what = f"The weights are {KINDS[quantized.kind][2]}; the metrics above are from before quantization."
        parts += ["## Quantization", what if comparison is not None else what.partition(";")[0] + ".", f"{quantized}."]
    if lineage is not None:
        parts += [
            "## Origin",
            _table(["", ""], [[name, escaped(text)] for name, text in _origin(lineage)]),
            f"Details, file by file: `{LINEAGE}`.",
        ]
    return redacted(f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n")


def _metadata(
    run: config.RunConfig, comparison: Comparison | None, is_whole: bool, quantized: QuantizationResult | None
) -> dict[str, Any]:
    is_adapter = not is_whole
    base = run.model.base
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()
    data = [s.path.removeprefix("hf:").split(":")[0].split("@")[0] for s in run.data.train if s.path.startswith("hf:")]
    header: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"} if on_hub else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ftray", run.method.type, *([quantized.kind] if quantized else [])],
    }
    if names := ["/".join(name.split("/")[:2]) for name in data if not name.startswith((".", "/", "~"))]:
        header["datasets"] = names
    if comparison is not None:
        head, rows = figure_rows(comparison)
        place = head.index("tuned")
        metrics = [
            {"type": row[0].lower().replace(" ", "_"), "name": row[0], "value": float(row[place])} for row in rows
        ]
        result = {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"type": "eval", "name": "eval records of the run's data"},
            "metrics": metrics,
        }
        header["model-index"] = [{"name": run.name, "results": [result]}]
    return header


def _training(run: config.RunConfig, checkpoint: CheckpointRef) -> list[list[str]]:
    train, method = run.train, run.method
    rows = [
        ["method", HOW[method.type]],
        *([["rank, alpha", f"{method.rank}, {method.alpha:g}"]] if method.type in ("lora", "qlora") else []),
        ["steps", f"{checkpoint.step}, of {train.global_batch_size} packed sequences of {run.data.max_seq_len} tokens"],
        ["learning rate", f"{train.learning_rate:g}, {train.schedule}, warmup {train.warmup:g}"],
        ["precision", train.precision],
        ["seed", str(train.seed)],
    ]
    if checkpoint.progress.best:
        rows.append(
            ["best eval loss", f"{checkpoint.progress.best['loss']:.4f} at step {checkpoint.progress.best['step']:.0f}"]
        )
    return rows


def _origin(lineage: Mapping[str, Any]) -> list[list[str]]:
    environment = lineage["environment"]
    packages = ", ".join(
        f"{name} {environment['packages'][name]}" for name in DECIDING if name in environment["packages"]
    )
    rows = [
        ["id", lineage["id"]],
        ["config", lineage["config_hash"]],
        ["data", f"{lineage['data']['hash']}, {len(lineage['data']['files'])} files"],
        ["template", lineage["template_hash"]],
        ["parent", lineage["parent"]],
        ["ftray's code", environment["code"]["commit"] or environment["code"]["sha256"]],
        ["image", environment["image"]],
        ["packages", f"{packages}; Python {environment['python']}"],
    ]
    return [[name, str(text)] for name, text in rows if text]


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table whose cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |" for line in lines)


def escaped(text: str) -> str:
    """Escapes foreign text for Markdown: it can't produce a link, image, HTML, heading, table or line break."""
    line = " ".join(printable(text).split())
    line = re.sub(r"([\\`*_\[\]<>|~!#$&])", r"\\\1", line)
    return re.sub(r"(?i)\b(https?|ftp|mailto)(:)|\b(www)(\.)", r"\1\3\\\2\4", line)  # bare addresses become links


def code_span(text: str) -> str:
    """Foreign text as a code span. `|` would end a table cell and is written as `¦`."""
    line = " ".join(printable(text).split()).replace("|", "¦") or " "
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
