"""A command as a person pastes it into a shell."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.plan import Command

__all__ = ["shell_command", "shell_words"]

_WIDTH: Final = 76
#: With the indent of a terminal a line of 80.
_ONE_LINE: Final = 78


def shell_command(command: Command) -> str:
    """Environment and arguments, quoted, broken before options by backslashes."""
    return shell_words(command.argv, command.env)


def shell_words(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Words as a shell reads them; on one line where that is short.

    Args:
        argv: the words.
        environment: variables of the command alone.
    """
    env = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    arguments = [shlex.quote(word) for word in argv]
    line = " ".join((*env, *arguments))
    if len(line) <= _ONE_LINE:
        return line
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    chunks: list[str] = []
    for word in arguments[first:]:
        if word.startswith("-") or not chunks:
            chunks.append(word)
        else:
            chunks[-1] += f" {word}"
    lines = _fill(env, "") + _fill([" ".join(arguments[:first])], "") + _fill(chunks, "    ")
    return " \\\n".join(lines)


def _fill(chunks: list[str], indent: str) -> list[str]:
    lines: list[str] = []
    for chunk in chunks:
        if lines and len(lines[-1]) + 1 + len(chunk) <= _WIDTH:
            lines[-1] += f" {chunk}"
        else:
            lines.append(f"{indent}{chunk}")
    return lines
