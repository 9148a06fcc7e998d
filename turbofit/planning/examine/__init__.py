"""The code of the checks in `planning.checks`; each file has one subject."""
