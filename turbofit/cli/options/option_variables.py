"""``TURBOFIT_COMMAND_OPTION``: every option's environment variable, and names that are none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from turbofit.core.errors import UsageError
from turbofit.core.process.variable_names import PREFIX, VARIABLES, is_service_link

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: click puts a command's name behind it.
ROOT: Final = PREFIX.rstrip("_")
#: Commands for somebody who looks for an error; they have no options of their own.
_ALWAYS_ANSWER: Final = frozenset({"completion", "help", "version"})


def variable(prefix: str, option: click.Parameter) -> str:
    """The variable of an option: ``TURBOFIT_SERVE_TP`` of ``--tp`` and the command's prefix."""
    name = max(option.opts, key=len).lstrip("-")
    return f"{prefix}_{name.replace('-', '_').upper()}"


def named_source(ctx: click.Context, message: str) -> str:
    """For a message about options: which of them are of the environment; empty where none is."""
    if ctx.auto_envvar_prefix is None:
        return ""
    words = {word.strip("`'\",.:;()") for word in message.split()}
    said = [
        f"{option} is from {variable(ctx.auto_envvar_prefix, one)}"
        for one in ctx.command.params
        if (option := max(one.opts, key=len)) in words
        and ctx.get_parameter_source(one.name or "") is ParameterSource.ENVIRONMENT
    ]
    return "; ".join(said)


def check_names(ctx: click.Context) -> None:
    """Refuse names of ours that are neither a variable nor an option of the command.

    Options of other commands are theirs to check. A command that is read again was checked before.

    Raises:
        UsageError: there is one; the hint has the nearest right name.
    """
    group, here = ctx.find_root().command, f"{ctx.auto_envvar_prefix}_"
    if ctx.auto_envvar_prefix is None or not isinstance(group, click.Group):
        return
    if ctx.info_name in _ALWAYS_ANSWER:
        return
    known = {variable(here[:-1], one) for one in ctx.command.params if _has_variable(one)}
    others = tuple(f"{PREFIX}{name.upper()}_" for name in group.list_commands(ctx))
    for name, text in os.environ.items():
        elsewhere = name.startswith(others) and not name.startswith(here)
        if not name.startswith(PREFIX) or elsewhere or name in known or name in VARIABLES:
            continue
        if not is_service_link(name, text):
            raise UsageError(
                f"{name} is neither a variable nor an option of turbofit",
                hint=_hint(name, known, ctx),
            )


def _has_variable(one: click.Parameter) -> bool:
    return isinstance(one, click.Option) and one.allow_from_autoenv


def options_by_command(ctx: click.Context) -> Iterator[tuple[str, click.Parameter]]:
    """Each option of each command, all of which are imported: for the answer to a wrong name."""
    group = ctx.find_root().command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is not None:
            yield from ((name, one) for one in command.params if _has_variable(one))


def _hint(name: str, known: Iterable[str], ctx: click.Context) -> str:
    """The nearest right name, or the one that is here what it is elsewhere."""
    from turbofit.core.synonyms import guess, synonym

    here = f"{ctx.auto_envvar_prefix}_"
    bare = name.removeprefix(here)
    if name != bare and (found := synonym(bare)):
        return found.here(os.environ[name], f"{here}{{variable}}={{value}}")
    every = (variable(f"{PREFIX}{of.upper()}", one) for of, one in options_by_command(ctx))
    # Without the prefix, by which all names are alike.
    right = sorted(one.removeprefix(PREFIX) for one in {*known, *VARIABLES, *every})
    meant = guess(name.removeprefix(PREFIX), right, of=PREFIX)
    return f"{meant}See docs/environment.md; options are {PREFIX}COMMAND_OPTION"
