"""Header-only checkpoints: they let an engine allocate memory, and have no weights."""
