"""DeepSpeed ZeRO: its config, sharded initialization, training state by parameter name."""
