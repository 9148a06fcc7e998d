"""``turbofit completion``: what shells ask turbofit while a line is typed."""

from __future__ import annotations

from typing import Final

import click

from turbofit.cli.command import Argument, command
from turbofit.cli.command_group import TURBOFIT
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError

SHELLS: Final = ("bash", "zsh", "fish")
#: The environment variable by which a shell asks `turbofit` for completions.
COMPLETE_VARIABLE: Final = "_TURBOFIT_COMPLETE"


@command(Argument("shell", metavar="SHELL", type=click.Choice(SHELLS)))
def completion(shell: str) -> int:
    """Print the shell's script, which asks turbofit itself at each TAB."""
    return complete(f"{shell}_source")


def complete(instruction: str) -> int:
    """Answer a shell's request, which is in its environment, for a script or for completions.

    Raises:
        UsageError: no shell makes such a request.
    """
    from click.shell_completion import get_completion_class

    name, _, what = instruction.partition("_")
    kind = get_completion_class(name)
    if kind is None or what not in ("source", "complete"):
        raise UsageError(
            f"{COMPLETE_VARIABLE}={instruction[:40]} is no shell's question",
            hint="unset it; turbofit completion bash prints the script that sets it",
        )
    shell = kind(TURBOFIT, {}, "turbofit", COMPLETE_VARIABLE)
    answer((shell.source() if what == "source" else shell.complete()) + "\n")
    return 0
