"""The fallback engine: ``transformers serve``'s own server with a device map, limits and a key."""
