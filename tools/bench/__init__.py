"""Measurements that the README reports: `python -m tools.bench inversion`, `... em` and so on, one file for each."""
