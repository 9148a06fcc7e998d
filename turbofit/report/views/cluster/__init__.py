"""Sections on clusters: the plan of one, and what it serves."""
