"""The commands, one or several in a file, which is imported when a user names a command of it."""
