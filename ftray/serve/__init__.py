"""The OpenAI-compatible endpoint on Ray Serve. Knows a directory of safetensors, nothing of its training."""
