"""What a process has beside its work: variables, state, files, log, signals, ports, progress."""
