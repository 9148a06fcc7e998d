"""Measures a launch, and what later plans learn of it."""
