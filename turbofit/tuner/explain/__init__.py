"""A plan in words: reasons, remedies, why others were rejected."""
