"""Checkpoints: written asynchronously, independent of the world size, listed and restored."""
