"""Is the tuned model better than its base? Read: compare, plan, score, metrics, bootstrap, figures, results; human, judge."""
