"""The embedded engine: transformers' continuous batching, with mixed LoRA adapters."""
