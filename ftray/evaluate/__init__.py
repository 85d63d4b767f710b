"""Is the tuned model better than its base? Read: metrics, compare, human, judge."""
