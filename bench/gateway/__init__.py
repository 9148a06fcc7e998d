"""Measures what the gateway costs, and tries to get past it."""
