"""Inference: the engine protocol, and the engines behind it. Knows nothing of HTTP, Ray or training."""
