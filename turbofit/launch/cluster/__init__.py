"""Engines on several machines, placed and kept by Ray."""
