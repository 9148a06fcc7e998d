"""Readers of model families, one file each: dimensions, and the rule for images."""
