"""``turbofit help``, ``version`` and ``completion``: its commands, for people and for shells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

import turbofit
from turbofit.cli.command import Argument, command
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem, ShellComplete

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
    from turbofit.cli.command_group import TURBOFIT

    return TURBOFIT.shell_complete(ctx, incomplete)


@command(Argument("name", required=False, metavar="COMMAND", shell_complete=_complete))
def help(name: str | None) -> int:  # noqa: A001 - the command's name
    from turbofit.cli.command_group import COMMANDS, TURBOFIT, unknown_command

    if name is not None and name not in COMMANDS:
        raise unknown_command([name])
    if name is not None:
        with TURBOFIT.make_context("turbofit", [name, "--help"]) as ctx:
            code: int = TURBOFIT.invoke(ctx)
        return code
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    answer("\n".join((_ABOVE, *lines, _BELOW)))
    return 0


@command()
def version() -> int:
    answer(f"turbofit {turbofit.__version__}\n")
    return 0


SHELLS: Final = ("bash", "zsh", "fish")
#: The environment variable in which a shell asks `turbofit` for completions.
COMPLETE_VARIABLE: Final = "_TURBOFIT_COMPLETE"


@command(Argument("shell", metavar="SHELL", type=click.Choice(SHELLS)))
def completion(shell: str) -> int:
    """Print the script, which asks turbofit itself at each TAB."""
    known = _shell(shell)
    assert known is not None
    answer(known.source() + "\n")
    return 0


def complete(instruction: str) -> int:
    """Answer a shell's request for completions, which stands in the environment.

    Raises:
        UsageError: no shell asks so.
    """
    shell, _, what = instruction.partition("_")
    known = _shell(shell)
    if known is None or what != "complete":
        raise UsageError(
            f"{COMPLETE_VARIABLE}={instruction[:40]} is no shell's question",
            hint="unset it; turbofit completion bash prints the script that sets it",
        )
    answer(known.complete() + "\n")
    return 0


def _shell(name: str) -> ShellComplete | None:
    """Click's completion of turbofit in a shell; None where click does not know the shell."""
    from click.shell_completion import get_completion_class

    from turbofit.cli.command_group import TURBOFIT

    kind = get_completion_class(name)
    return None if kind is None else kind(TURBOFIT, {}, "turbofit", COMPLETE_VARIABLE)
