"""``turbofit help [COMMAND]``: all commands, or the page of one; and ``turbofit version``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import turbofit
from turbofit.cli.command import Argument, command
from turbofit.cli.terminal.output import answer

if TYPE_CHECKING:
    import click
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
