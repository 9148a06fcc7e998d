"""The memory account: all that an engine allocates, term by term; one folder for each engine.

``engines`` names the engines. In the folder of an engine ``account`` names the terms, and ``pool``
or ``activations``, ``cache`` and ``weights`` have the formulas. A new term is named in ``account``.
"""
