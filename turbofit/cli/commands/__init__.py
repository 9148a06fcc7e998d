"""A file for each command, or for a few commands; naming a command imports its file."""
