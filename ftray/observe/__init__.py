"""What is seen of a run: before it (plan), while it trains (alarms) and after (report, card, lineage)."""
