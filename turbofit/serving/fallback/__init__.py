"""The fallback engine: a small server over Transformers, with a device map, limits and a key."""
