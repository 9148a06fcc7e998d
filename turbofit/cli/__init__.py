"""The command line: one thin file for each command, or for a few that share options.

``main`` finds the command, ``command`` sorts the words of the command line, ``usage_errors``
answers wrong options, and `core.validation` wrong values.
"""
