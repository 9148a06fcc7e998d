"""Reads checkpoints: folders, hub, presets; a file for each family."""
