"""Plans for the fallback engine: which component on which device, and how much context is left."""
