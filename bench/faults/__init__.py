"""Measures how a server recovers from faults."""
