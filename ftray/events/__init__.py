"""Events of a run: the bus that delivers them, the log in storage, alerts."""
