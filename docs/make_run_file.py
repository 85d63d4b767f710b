"""Writes docs/run-file.md, the reference of the run file, from the schema: `python docs/make_run_file.py`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ftray.config import RunConfig
from ftray.config.loader import Schema

PAGE = Path(__file__).with_name("run-file.md")
HEAD = """\
<!-- Made by `python docs/make_run_file.py` from ftray/config/; a unit test says when it is out of date. -->

# The run file

One YAML file describes a run. `ftray check <file>` reads it and says what follows from it; an unknown key is an error
that names the closest one. Any key can be overridden on the command line: `ftray train <file> train.max_steps=10
data.train.0.path=s3://bucket/more/`. Numbers may be written as `2e-4`. Keys without a default must be given.
"""


def render() -> str:
    """The whole page."""
    schema = Schema(RunConfig)
    return "\n".join([HEAD, *_tables(schema, schema.tree, "")])


def _tables(schema: Schema, section: dict[str, Any], name: str) -> Iterator[str]:
    """A section's table, then those of the sections below it."""
    if name:
        yield f"## {name}\n\n{section['description']}\n"
    yield "| key | what it must be | default | |\n|---|---|---|---|"
    for key, field in section["properties"].items():
        if not schema.sections(field):
            yield f"| `{key}` | {_words(schema, field)} | {_default(field)} | {_cell(field['description'])} |"
        else:
            below = "see below" if name else f"[section](#{key})"
            yield f"| `{key}` | {below} | {_default(field)} | {_cell(_description(schema, field))} |"
    yield ""
    for key, field in section["properties"].items():
        for plain in schema.options(field):
            for found in schema.sections(plain):
                if (
                    found["title"] != "SourceConfig" or key == "train"
                ):  # the sources of data.eval have the keys of data.train's
                    below = f"{name}.{key}".lstrip(".")
                    ending = "[]" if plain["type"] == "array" else ".<key>" if "additionalProperties" in plain else ""
                    yield from _tables(schema, found, below + ("" if "properties" in plain else ending))


def _description(schema: Schema, field: dict[str, Any]) -> str:
    return field.get("description") or " ".join(section["description"] for section in schema.sections(field))


def _words(schema: Schema, field: dict[str, Any]) -> str:
    return _cell(" or ".join(schema.phrase(plain) for plain in schema.options(field)))


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return ""
    default = field["default"]
    if isinstance(default, dict) and default:
        return "its own"
    text = yaml.safe_dump(default, default_flow_style=True, width=200).removesuffix("\n...\n").strip()
    return "left out" if default is None else f"`{text}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
