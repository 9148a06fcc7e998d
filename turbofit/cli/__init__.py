"""The command line: one thin file for each command, or for a few that share options.

``main`` finds the command, ``words`` sorts the words of its line, ``usage_errors`` answers wrong
options, and `core.validation` answers wrong values.
"""
