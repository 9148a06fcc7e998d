"""Checks on a real GPU: constants that a rehearsal cannot know, and forecasts beside NVML."""
