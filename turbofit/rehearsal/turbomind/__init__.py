"""Rehearses TurboMind on a pretend machine."""
