"""Commands, processes and their supervision."""
