"""Turns a person's request into a plan: it is resolved, searched, and given its commands.

Read in this order: ``request`` (what a person asks for), ``resolve`` (its machine and model),
``search`` (each shape is sized and ranked), ``choose`` (the engine, and the plan with the rows of
all candidates), ``reasons`` (why a setting is as it is, and why a candidate lost), ``remedies``
(what would help), ``plan`` and ``commands`` (command lines).
"""
