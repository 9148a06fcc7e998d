"""Header-only checkpoints: what an engine needs to allocate, and no weights."""
