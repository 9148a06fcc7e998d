"""Candidates, constraints, throughput, search and remedies."""
