"""Reads the logs of engines, and says why a run ended and what to change first."""
