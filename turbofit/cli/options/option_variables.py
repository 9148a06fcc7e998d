"""``TURBOFIT_COMMAND_OPTION``: each option's environment variable; wrong names are refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from turbofit.cli.terminal.output import say
from turbofit.cli.usage_errors import options_by_command
from turbofit.core.errors import UsageError
from turbofit.core.process.variable_names import PREFIX, VARIABLES, is_service_link

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT: Final = PREFIX.rstrip("_")


def variable(prefix: str, option: click.Parameter) -> str:
    """The variable of an option, such as ``TURBOFIT_SERVE_TP`` for ``--tp``, by its prefix."""
    name = max(option.opts, key=len).lstrip("-")
    return f"{prefix}_{name.replace('-', '_').upper()}"


def with_source(exc: UsageError, ctx: click.Context) -> UsageError:
    """Add to an error which of its options come from the environment."""
    if ctx.auto_envvar_prefix is None:
        return exc
    words = {word.strip("`'\",.:;()") for word in exc.message.split()}
    sources = [
        f"{option} is from {variable(ctx.auto_envvar_prefix, param)}"
        for param in ctx.command.params
        if (option := max(param.opts, key=len)) in words
        and ctx.get_parameter_source(param.name or "") is ParameterSource.ENVIRONMENT
    ]
    if sources:
        exc.hint = f"{exc.hint} ({'; '.join(sources)})"
    return exc


def check_names(ctx: click.Context) -> None:
    """Refuse variables with turbofit's prefix that are neither known nor the command's options.

    Variables of other commands are checked by those. A command that is read again was checked
    before.

    Raises:
        UsageError: a variable has turbofit's prefix, and nothing reads it.
    """
    group, here = ctx.find_root().command, f"{ctx.auto_envvar_prefix}_"
    if ctx.auto_envvar_prefix is None or not isinstance(group, click.Group):
        return
    if ctx.info_name == "completion":  # which has no options
        return
    if ctx.info_name == "serve":
        _say_of_ollama()
    known = _variables(ctx.command, here[:-1])
    others = tuple(f"{PREFIX}{name.upper()}_" for name in group.list_commands(ctx))
    for name in (name for name in os.environ if name.startswith(PREFIX)):
        elsewhere = name.startswith(others) and not name.startswith(here)
        right = name in known or name in VARIABLES or is_service_link(name, os.environ[name])
        if not elsewhere and not right:
            raise UsageError(
                f"{name} is neither a variable nor an option of turbofit",
                hint=_hint(name, known, ctx),
            )


def _say_of_ollama() -> None:
    """Say what Ollama's variables are called here, since none of them is read."""
    from turbofit.core.synonyms import synonym

    for name, text in os.environ.items():
        if name.startswith("OLLAMA_") and (meaning := synonym(name)):
            say(f"{name} is not read: {meaning.here(text, '--{option} {value}')}")


def _variables(command: click.Command, prefix: str) -> set[str]:
    return {variable(prefix, param) for param in command.params if _has_variable(param)}


def _has_variable(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and param.allow_from_autoenv


def _hint(name: str, known: Iterable[str], ctx: click.Context) -> str:
    """A hint for a wrong variable: its meaning here if other programs have it, or a near name."""
    from turbofit.core.synonyms import guess, synonym

    here = f"{ctx.auto_envvar_prefix}_"
    bare = name.removeprefix(here)
    if name != bare and (meaning := synonym(bare)):
        return meaning.here(os.environ[name], f"{here}{{variable}}={{value}}")
    options = (
        (command, param) for command, param in options_by_command(ctx) if _has_variable(param)
    )
    every = (variable(f"{PREFIX}{command.upper()}", param) for command, param in options)
    # Names are compared without the prefix, which all of them share.
    right = sorted(other.removeprefix(PREFIX) for other in {*known, *VARIABLES, *every})
    meant = guess(name.removeprefix(PREFIX), right, of=PREFIX)
    return f"{meant}See docs/environment.md; options are {PREFIX}COMMAND_OPTION"
