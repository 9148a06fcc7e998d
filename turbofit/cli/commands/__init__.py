"""The commands, each imported when it is named; one file has one or several."""
