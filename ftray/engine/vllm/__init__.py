"""The vLLM engine behind the engine protocol."""
