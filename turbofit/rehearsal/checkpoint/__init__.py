"""Writes checkpoints that have headers, but no weights; an engine still allocates all memory."""
