"""Base model, tokenizer, adapters, and what is saved of them. Read: embedded, load, lora, export."""
