"""Finds out by trying: calibrations, tunings, loads on a server, used memory over time."""
