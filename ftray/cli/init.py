"""`ftray init`: from a data file to a run file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ftray import config
from ftray.cli.context import command
from ftray.console import Console
from ftray.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from ftray.data.profile import SourceProfile

CHARS_PER_TOKEN = 3.5  # of text whose tokenizer is not at hand
TEMPLATE_TOKENS = 12  # of a turn


@command()
def init(
    data: Annotated[
        str,
        Argument(metavar="DATA", help="File, directory or glob, s3://… or hf:org/name.", show_default=False),
    ],
    base: Annotated[str | None, Option(help="Base model. Default: one that fits this machine.")] = None,
    task: Annotated[
        str | None,
        Option(help="chat, classify, summarize, extract, tools or pretrain. Default: what the records look like."),
    ] = None,
    name: Annotated[str | None, Option(help="Name of the run. Default: after DATA.")] = None,
    out: Annotated[str | None, Option(metavar="FILE", help="The run file. Default: NAME.yaml.")] = None,
    *,
    console: Console,
) -> int:
    """Look at a data set and write a run file for it."""
    from ftray import storage
    from ftray.config.loader import parse_yaml
    from ftray.data.profile import TASKS, profile_source
    from ftray.report.propose import choose_base, find_hardware, propose

    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {task}: there is no such task; use one of {', '.join(TASKS)}")
    name = name or _name_after(data)
    target = Path(out or f"{name}.yaml")
    if target.exists():
        raise ConfigError(f"{target} exists; delete it, or choose another file with --out")
    if not target.parent.is_dir():
        raise ConfigError(f"--out {target}: there is no directory {target.parent}; create it")
    profile = profile_source(data, next((known for known in TASKS if known == task), None))
    hardware = find_hardware()
    base = base or choose_base(hardware)
    lengths, answers, problem = _token_lengths(base, profile)
    if problem:
        console.warn(f"lengths are estimated from characters: {problem}")
    proposal = propose(profile, name, base, hardware, lengths, answers, is_estimated=bool(problem))
    config.parse_run(parse_yaml(proposal.text, str(target)), str(target))  # what is written is valid
    storage.write_bytes(storage.absolute(str(target)), proposal.text.encode())
    for fact, text in proposal.facts:
        console.say(f"{fact:<11}{text}")
    console.say(f"\nwrote {target}. Next:")
    console.say(f"  ftray data preview {target}   # the records as the model sees them")
    console.say(f"  ftray run {target}            # train, evaluate, export")
    return 0


def _name_after(data: str) -> str:
    """A run name from the last part of a path that has letters."""
    parts = [part for part in re.split(r"[/:@]", data) if re.search(r"[A-Za-z0-9]", part)] or ["run"]
    stem = re.sub(r"(\.(jsonl|ndjson|json|csv|parquet|arrow|gz|zst))+$", "", parts[-1], flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40] or "run"


def _token_lengths(base: str, profile: SourceProfile) -> tuple[list[int], list[int], str]:
    """Tokens of each sample and of its answer; and why they are only estimated, if the tokenizer cannot be loaded."""
    from ftray.chat import ChatFormat, Conversation
    from ftray.errors import DataError
    from ftray.model.load import load_tokenizer

    texts = [_text_of(sample) for sample in profile.samples]
    answers = [
        next((m.content for m in reversed(sample.messages) if m.role == "assistant"), "")
        for sample in profile.samples
        if isinstance(sample, Conversation)
    ]
    try:
        tokenizer = load_tokenizer(config.ModelConfig(base=base))
        chat = ChatFormat(tokenizer)
    except ModelError as err:
        return [_estimate(text) for text in texts], [_estimate(text) for text in answers], str(err)
    encoded = chat.encode_examples(list(profile.samples))
    refused = next((item for item in encoded if isinstance(item, DataError)), None)
    if refused is not None and all(isinstance(item, DataError) for item in encoded):
        raise DataError(f"{profile.path}: {refused}")
    lengths = [item.longest for item in encoded if not isinstance(item, DataError)]
    ids: list[Any] = tokenizer(answers, add_special_tokens=False)["input_ids"] if answers else []
    return lengths, [len(each) for each in ids], ""


def _text_of(sample: Any) -> str:
    return sample if isinstance(sample, str) else "\n".join(message.content for message in sample.messages)


def _estimate(text: str) -> int:
    return TEMPLATE_TOKENS + round(len(text) / CHARS_PER_TOKEN)
