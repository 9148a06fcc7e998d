"""Explains a plan in words: reasons, remedies, and why other shapes were rejected."""
