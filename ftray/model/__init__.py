"""Base models, adapters, attention, quantization, and export. Start with load, lora, export."""
