"""What only a real GPU tells: constants that a rehearsal cannot know, and forecasts beside NVML."""
