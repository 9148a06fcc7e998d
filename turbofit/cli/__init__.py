"""The command line: one thin file for each command, or for a few that share options.

``main`` finds the command, ``command`` reads the words, ``usage_errors`` answers wrong options, and
`core.validation` wrong values.
"""
