"""Loggers of library code, for people who look for the cause of an error.

Their names are those of the modules (``turbofit.model.hub``), so that ``turbofit`` is the parent of
all of them. Nothing here sets a handler: a program sets its own, the command line does so with
``--verbose``. What a user has to know is said by errors and by the warnings of an answer, not here.
"""

from __future__ import annotations

import sys


class LazyLogger:
    """A logger that costs nothing until the program imports `logging`, which takes 3 to 5 ms.

    Before that there can be no handler, and the one of last resort shows warnings and errors only:
    nobody would see these messages. So there is no method for a warning.

    Args:
        name: the module's ``__name__``.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def info(self, message: str, *values: object) -> None:
        """Say what a command does, in a few messages; ``values`` are put in as `logging` does."""
        if "logging" in sys.modules:
            import logging  # waits until another thread's import of it has ended

            logging.getLogger(self._name).info(message, *values, stacklevel=2)

    def debug(self, message: str, *values: object) -> None:
        """Say more: each shape of a search, each file of a hub, each request that was lowered."""
        if "logging" in sys.modules:
            import logging

            logging.getLogger(self._name).debug(message, *values, stacklevel=2)
