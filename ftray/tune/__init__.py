"""Hyperparameter sweeps. A trial is the run file with other settings, trained as a run of its own.

Modules: the search space, the search algorithm, the scheduler (early stopping), the state in storage, the runner, and the
report.
"""
