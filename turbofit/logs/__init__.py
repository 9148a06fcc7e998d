"""Explains why an engine died (`read_log`, `explain`)."""
