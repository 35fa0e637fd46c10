"""Measurements that the README reports, on the demo model: `python -m tools.bench inversion`, `... bases`."""
