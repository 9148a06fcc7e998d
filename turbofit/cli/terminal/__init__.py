"""The terminal of a person: output, progress, Ctrl-C."""
