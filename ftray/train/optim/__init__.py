"""Optimizer, learning-rate schedule, loss scaling."""
