"""Reads the logs of engines, and says why a run ended and what to change first.

``log_reader`` turns a line into an event, and ``death`` the events into an `End`. For
`turbofit diagnose`, ``facts`` reads a whole file and notes which rows of ``presets/causes.yaml``
match a line, ``rules`` makes an answer of such a row, ``out_of_memory`` one of a lack of memory
with what ``account`` computes, and ``explain`` makes the one answer with its first step.
"""
