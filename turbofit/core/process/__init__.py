"""The process's surroundings: variables, state, files, log, signals, ports and progress."""
