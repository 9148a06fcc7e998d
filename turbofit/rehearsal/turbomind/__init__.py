"""TurboMind on a pretend machine."""
