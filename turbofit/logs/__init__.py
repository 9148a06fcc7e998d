"""Reads the logs of engines, and says why a run ended and what to change first.

``log_reader`` turns a line into an event, and ``death`` turns the events into an `End`. For
`turbofit diagnose`, ``facts`` reads a whole file and notes which rows of ``presets/causes.yaml``
match a line. ``rules`` makes a possible answer of each such row, and ``out_of_memory`` makes a
possible answer to a lack of memory from what ``account`` computes. ``explain`` chooses the answer
and adds the first step.
"""
