"""Reads checkpoints: from folders, hubs and presets; each family has a file."""
