"""A command as a person pastes it into a shell."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from turbofit.core.plan import Command

__all__ = ["shell_command"]

_WIDTH: Final = 76


def shell_command(command: Command) -> str:
    """Environment and arguments, quoted, broken before options by backslashes."""
    env = [f"{name}={shlex.quote(value)}" for name, value in command.env.items()]
    arguments = [shlex.quote(word) for word in command.argv]
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
