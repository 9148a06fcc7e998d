"""A cluster of pretend nodes under kills."""
