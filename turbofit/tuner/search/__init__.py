"""Every shape that could run, evaluated."""
