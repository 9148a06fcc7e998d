"""The memory account: all memory that an engine allocates, as terms; each engine has a folder.

``engines`` names the engines. In an engine's folder, ``account`` names the terms; ``pool`` or
``activations``, ``cache`` and ``weights`` have the formulas. docs/architecture.md has a table with
the function of each term.
"""
