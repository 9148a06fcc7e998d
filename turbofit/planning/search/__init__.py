"""The search: all shapes that could run are evaluated."""
