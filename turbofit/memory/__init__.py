"""The memory account: all that an engine allocates, term by term; one folder for each engine."""
