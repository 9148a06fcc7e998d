"""Loggers of library code, below ``turbofit``: a program sets a handler, or ``--verbose`` does."""

from __future__ import annotations

import sys


class LazyLogger:
    """A logger that costs nothing until the program imports `logging`, which takes 3 to 5 ms.

    Before that there is no handler. There is no method for a warning: what a user has to know is
    said by errors and by the warnings of an answer.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def info(self, message: str, *values: object) -> None:
        """Say what a command does, in a few messages."""
        if "logging" in sys.modules:
            import logging  # waits until another thread's import of it has ended

            logging.getLogger(self._name).info(message, *values, stacklevel=2)

    def debug(self, message: str, *values: object) -> None:
        """Say more: each shape of a search, each file of a hub, each lowered request."""
        if "logging" in sys.modules:
            import logging

            logging.getLogger(self._name).debug(message, *values, stacklevel=2)
