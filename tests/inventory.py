"""Finds the calls in ftray/ that parse foreign bytes, start processes or compile templates. docs/security.md lists them."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Matched against the end of a call's dotted name: `yaml.load` matches `yaml.load(…)`, `from_pretrained` any method so named.
PARSERS = (
    "json.loads",
    "json.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.safe_load",
    "yaml.safe_load_all",
    "pickle.load",
    "pickle.loads",
    "cloudpickle.loads",
    "marshal.loads",
    "torch.load",
    "np.load",
    "safe_open",
    "load_file",
    "safetensors.torch.load",
    "load_safetensors",
    "from_pretrained",
    "from_config",
    "Tokenizer.from_file",
    "Tokenizer.from_str",
    "Tokenizer.from_buffer",
    "from_gguf",
    "GGUFReader",
    "load_dataset",
    "load_dataset_builder",
    "ParquetFile",
    "read_table",
    "read_schema",
    "read_metadata",
    "read_parquet",
    "ipc.open_file",
    "ipc.open_stream",
    "memory_map",
    "gzip.open",
    "gzip.GzipFile",
    "GzipFile",
    "decompressobj",
    "zlib.decompress",
    "gzip.decompress",
    "ZstdDecompressor",
    "csv.reader",
    "csv.DictReader",
    "ast.parse",
    "literal_eval",
    "ElementTree.parse",
    "ElementTree.fromstring",
    "zipfile.ZipFile",
    "tarfile.open",
    "import_module",
    "eval",
    "exec",
)
PROCESSES = (
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
    "os.system",
    "os.popen",
    "os.execv",
    "os.execve",
    "os.execvp",
    "os.fork",
    "os.posix_spawn",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "context.Process",
    "multiprocessing.Process",
    "Process",
    "get_context",
)
TEMPLATES = (
    "from_string",
    "get_template",
    "compile_expression",
    "Template",
    "Environment",
    "SandboxedEnvironment",
    "ImmutableSandboxedEnvironment",
)
KINDS = {"parses": PARSERS, "starts": PROCESSES, "templates": TEMPLATES}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a call's function; what is no name becomes `?`."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def calls(kind: str) -> dict[str, set[str]]:
    """File below ftray/ → names of the calls of one kind (`parses`, `starts`, `templates`) in it."""
    files: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "ftray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                files[str(path.relative_to(ROOT))] |= {
                    known
                    for known in KINDS[kind]
                    if name == known or (known not in ("eval", "exec") and name.endswith(f".{known}"))
                }
    return {file: names for file, names in files.items() if names}


if __name__ == "__main__":
    for kind in KINDS:
        for file, names in calls(kind).items():
            print(kind, file, ", ".join(sorted(names)))
