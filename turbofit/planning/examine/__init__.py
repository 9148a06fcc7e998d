"""What the checks of `planning.checks` look at, a subject a file."""
