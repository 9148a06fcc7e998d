"""Reads the logs of engines, and says why a run ended and what to change first.

``log_reader`` turns a line into an event, and ``death`` turns the events into an `End`. For
`turbofit diagnose`, ``facts`` reads a whole log and finds the rows of ``presets/causes.yaml`` for
each line. ``rules`` makes a possible answer of each row. ``out_of_memory`` makes the answer to a
lack of memory, with the bytes of ``account``. ``explain`` chooses the answer and adds the first
step.
"""
