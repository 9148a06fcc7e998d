"""What a process needs of its system: variables, files, logs, signals, ports."""
