"""argparse with our errors: wrong use is a `UsageError`, never a print and an exit."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from turbofit.core.errors import UsageError

__all__ = ["Parser"]


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Help of a fixed width: argparse would import `shutil` for every option to ask for one."""
    return argparse.HelpFormatter(prog, width=96)


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors carry a hint."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _formatter, **keywords})

    def add_verbose(self) -> None:
        """The option that all commands have."""
        self.add_argument(
            "-v", "--verbose", action="count", default=0,
            help="what is done, on stderr; -vv: each step of it",
        )  # fmt: skip

    def format_help(self) -> str:
        """The options, then examples, exit codes and what the command touches."""
        from turbofit.cli.manual import manual_text

        return super().format_help() + manual_text(self.prog.rpartition(" ")[2])

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UsageError: always.
        """
        hint = f"see {self.prog} --help"
        if message.startswith("unrecognized arguments: "):
            near = self._nearest(message.split(": ", 1)[1].split(maxsplit=1)[0])
            hint = f"did you mean {near}? {hint}" if near else hint
        raise UsageError(message, hint=hint)

    def _nearest(self, word: str) -> str | None:
        import difflib

        known = [option for action in self._actions for option in action.option_strings]
        name = word.partition("=")[0]
        return next(iter(difflib.get_close_matches(name, known, n=1)), None)
