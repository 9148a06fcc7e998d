"""Fuzzing with coverage of everything that reads what others wrote."""
