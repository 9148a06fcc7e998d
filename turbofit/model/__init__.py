"""Reads checkpoints from folders, hubs and presets; `families` has a file for each family."""
