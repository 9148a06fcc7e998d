"""Turns a person's request into a plan with its command lines.

Read the modules in this order: ``request`` (what a person asks for), ``resolve`` (reads the machine
and the model), ``search`` (sizes and ranks each shape), ``choose`` (takes an engine and makes the
plan with a row for each candidate), ``reasons`` (why a setting is as it is), ``why_lost`` (why a
candidate lost), ``remedies`` (what would help), ``plan`` and ``commands`` (command lines).
"""
