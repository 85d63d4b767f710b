"""The driver of a training run: starts and supervises worker groups, and keeps the run record and its lineage."""
