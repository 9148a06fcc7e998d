"""One engine: its process, log, phases, readiness and end."""
