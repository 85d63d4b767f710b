"""Compares the tuned model with its base. Start with run, plan, score, metrics, summary, results."""
