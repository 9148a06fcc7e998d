"""Loggers of library code, below the logger ``turbofit``.

A program or ``--verbose`` adds a handler to that logger.
"""

from __future__ import annotations

import sys


class LazyLogger:
    """A logger that costs nothing until the program imports `logging`, which takes 3 to 5 ms.

    Before that import no handler exists. The logger has no method for warnings: errors, and the
    warnings in answers, have all facts that users need.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def info(self, message: str, *values: object) -> None:
        """Log a main step of a command."""
        if "logging" in sys.modules:
            import logging  # waits while another thread imports it

            logging.getLogger(self._name).info(message, *values, stacklevel=2)

    def debug(self, message: str, *values: object) -> None:
        """Log a detail: a shape of a search, a file of a hub, a lowered request."""
        if "logging" in sys.modules:
            import logging

            logging.getLogger(self._name).debug(message, *values, stacklevel=2)
