"""``turbofit help``, ``version`` and ``completion``: lists of commands for people and shells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

import turbofit
from turbofit.cli.command import Argument, command
from turbofit.cli.command_group import COMMANDS, TURBOFIT, unknown_command
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_ABOVE: Final = """\
Usage: turbofit [--help] [--version] COMMAND ...

Plans, launches and checks LMDeploy vision-language servers so that they never
run out of GPU memory.

Commands:"""
_BELOW: Final = """
turbofit COMMAND --help tells more: options, examples, exit codes, and what it
touches.
"""


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return TURBOFIT.shell_complete(ctx, incomplete)


@command(Argument("name", required=False, metavar="COMMAND", shell_complete=_complete))
def help(name: str | None) -> int:  # noqa: A001 - the command's name
    if name is not None and name not in COMMANDS:
        raise unknown_command([name])
    if name is not None:
        with TURBOFIT.make_context("turbofit", [name, "--help"]) as ctx:
            return int(TURBOFIT.invoke(ctx))
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    answer("\n".join((_ABOVE, *lines, _BELOW)))
    return 0


@command()
def version() -> int:
    answer(f"turbofit {turbofit.__version__}\n")
    return 0


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
