"""Faults and what becomes of a server, and what diagnoses say of deaths."""
