"""Measurements, each started by `python -m bench.NAME`; see README.md."""
