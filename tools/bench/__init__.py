"""Measurements that README and doc/ report: `python -m tools.bench inversion`, `... em` and so on, one file for each."""
