"""Private or patched APIs of dependencies: a module per dependency, each change with its reason and its test."""
