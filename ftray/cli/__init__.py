"""The command line: `main` parses it, and a module per group of commands carries it out."""
