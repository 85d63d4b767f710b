"""Writes docs/migrating.md: the keys of other trainers, and where defaults differ."""

from pathlib import Path

from ftray.config import parse_run
from ftray.config.aliases import ALIASES

PAGE = Path(__file__).with_name("migrating.md")
HEAD = """\
<!-- Made by `python docs/make_migrating.py` from ftray/config/aliases.py; a unit test says when it is out of date. -->

# Coming from TRL, axolotl or LLaMA-Factory

`ftray init DATA` writes a run file for your data. On the same batches, the losses equal TRL's within 1e-6. If you type a key of
another trainer, the error names ftray's.

## Defaults that differ

Compared with TRL 1.16.

| setting | ftray | TRL | reason |
|---|---|---|---|"""
KEYS = """
## Keys

| key of another trainer | in ftray |
|---|---|"""
# Key of a run file, TRL's default, reason.
DEFAULTS = (
    (
        "train.learning_rate",
        "2e-05",
        "adapters learn well at ten times the rate; with `method.type: full` it is 2e-05 here, too",
    ),
    ("train.schedule", "linear", "cosine is the usual choice of published recipes"),
    ("train.warmup", "0", "the first steps of an optimizer without history are the least reliable"),
    ("train.epochs", "3", "a pass is enough for large data sets; `ftray init` proposes 3 for small ones"),
    ("train.global_batch_size", "8 records per device", "it does not depend on the number of devices"),
    ("data.max_seq_len", "1024", "longer records are an error instead of being cut"),
    ("data.packing", "false", "packed documents do not see each other, so packing changes no loss"),
    ("train.seed", "42", "any number will do"),
    ("train.weight_decay", "0", "the value is the same, but ftray's decay also applies to norms and biases"),
)


def render() -> str:
    """The whole page."""
    run = parse_run({"name": "r", "model": {"base": "m"}, "data": {"train": [{"path": "p"}]}}, "defaults")
    lines = [HEAD]
    for key, theirs, reason in DEFAULTS:
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        ours = (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )
        lines.append(f"| `{key}` | {ours} | {theirs} | {reason} |")
    lines.append(KEYS)
    for key, answer in sorted(ALIASES.items()):
        lines.append(f"| `{key}` | {answer if ' ' in answer else f'`{answer}`'} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
