"""Options that nobody types: environment variables, and the YAML file of ``-f FILE``.

The command line overrides the variables, the variables override the file, and the file overrides
the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from turbofit.core.errors import UsageError, option_of
from turbofit.core.messages import guess, of_other_server
from turbofit.core.process.variables import PREFIX, VARIABLES, is_service_link

ROOT: Final = PREFIX.rstrip("_")
#: The commands that take ``-f FILE``; a file may have options of plan and of serve.
_WITH_FILE: Final = ("plan", "serve")
#: The key, in a context's ``meta``, of the file of options; missing without ``-f``.
FILE: Final = "turbofit.file"
#: The key, in a context's ``meta``, of the words of the command line after the command's name.
WORDS: Final = "turbofit.words"
_LARGEST: Final = 1 << 20
_HINT: Final = "docs/environment.md#a-file-of-options has its form"


def variables_of(command: click.Command, prefix: str) -> Iterator[str]:
    """Yield the environment variables of a command's options, such as ``TURBOFIT_SERVE_TP``."""
    for param in command.params:
        if isinstance(param, click.Option) and param.allow_from_autoenv:
            yield f"{prefix}_{str(param.name).upper()}"


def check_names(ctx: click.Context) -> None:
    """Refuse variables with turbofit's prefix that are neither known nor the command's options.

    Variables with the prefix of another command are not checked.

    Raises:
        UsageError: a variable has turbofit's prefix, and nothing reads it.
    """
    group, prefix = ctx.find_root().command, ctx.auto_envvar_prefix
    if prefix is None or not isinstance(group, click.Group) or ctx.info_name == "completion":
        return
    known = {*VARIABLES, *variables_of(ctx.command, prefix)}
    prefixes = {f"{PREFIX}{name.upper()}": name for name in group.list_commands(ctx)}
    others = tuple(f"{other_prefix}_" for other_prefix in prefixes if other_prefix != prefix)
    wrong = [
        name
        for name, value in os.environ.items()
        if name.startswith(PREFIX) and not name.startswith(others) and name not in known
        if not is_service_link(name, value)
    ]
    if wrong:
        for other_prefix, command_name in prefixes.items():
            command = group.get_command(ctx, command_name)
            known.update(variables_of(command, other_prefix) if command else ())
        bare = wrong[0].removeprefix(f"{prefix}_")
        near = of_other_server(bare, lambda it: f"{prefix}_{it.upper()}")
        own = f"{prefix}_{wrong[0].removeprefix(PREFIX)}".upper()  # without the command's name
        near = near or guess(own if own in known else wrong[0].upper(), sorted(known))
        raise UsageError(
            f"{wrong[0]} is neither a variable nor an option of turbofit",
            hint=f"{near or f'options are {PREFIX}COMMAND_OPTION'}; see docs/environment.md",
        )


def with_source(exc: UsageError, ctx: click.Context) -> UsageError:
    """Add to an error's hint which options are from the environment or a file."""
    for name in exc.options:
        field = name.rstrip("_")
        source = ctx.get_parameter_source(field)
        if source is ParameterSource.ENVIRONMENT:
            exc.hint += f" ({option_of(name)} is from {ctx.auto_envvar_prefix}_{field.upper()})"
        elif source is ParameterSource.DEFAULT_MAP:
            exc.hint += f" ({option_of(name)} is from {ctx.meta[FILE]})"
    return exc


def use_file(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Make the options of a YAML file the defaults of the command line."""
    if value is not None and not ctx.resilient_parsing:
        ctx.meta[FILE] = path = Path(value)
        try:
            ctx.default_map = read_file(path, ctx)
        except UsageError as exc:
            raise UsageError(f"{path}: {exc.message}", hint=exc.hint) from None


def read_file(path: Path, ctx: click.Context) -> dict[str, Any]:
    """Return the values in a YAML file of options, by option, as texts of a command line.

    Raises:
        UsageError: the file cannot be read, or has a wrong key or value.
    """
    group, values = ctx.find_root().command, dict[str, Any]()
    commands: list[click.Command | None] = [ctx.command]
    if isinstance(group, click.Group):
        commands = [group.get_command(ctx, name) for name in _WITH_FILE]
    params = {str(param.name): param for it in commands if it for param in it.params}
    for key, nodes, is_null in _entries(path):
        name = key.replace("-", "_")
        if name not in params:
            near = guess(name, params) or of_other_server(name, str) or _HINT
            raise UsageError(f"{key} is no option of plan or serve", hint=near)
        if name.endswith("key"):
            raise UsageError(
                f"{key} is a secret, and this is no file for secrets",
                hint="write api_key_file: FILE, or set TURBOFIT_API_KEY",
            )
        texts = [node.value for node in nodes]
        if name in values or not all(isinstance(text, str) for text in texts):
            wrong = "stands twice" if name in values else "should be a value, or a list of values"
            raise UsageError(f"{key} {wrong}", hint=f"write {name}: VALUE")
        if not is_null:
            values[name] = texts if params[name].multiple else " ".join(texts)
    return values


def _entries(path: Path) -> Iterator[tuple[str, list[Any], bool]]:
    """Yield each key of a YAML file, the nodes of its value, and whether the value is null."""
    import yaml

    try:
        with path.open("rb") as file:
            root = yaml.compose(file.read(_LARGEST), Loader=yaml.SafeLoader)
    except OSError as exc:
        raise UsageError(f"it cannot be read: {exc.strerror or exc}", hint=_HINT) from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        mark, problem = getattr(exc, "problem_mark", None), getattr(exc, "problem", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise UsageError(f"{line}no YAML: {problem or 'no text'}", hint=_HINT) from None
    if not isinstance(root, yaml.MappingNode):
        raise UsageError("it has no options", hint=_HINT)
    for key, value in root.value:
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        yield str(key.value), nodes, value.tag == "tag:yaml.org,2002:null"


def read_again(ctx: click.Context) -> dict[str, Any]:
    """Parse the words of a command again, for SIGHUP: its file of options may have changed.

    Return the value of each option by its name.
    """
    words, prefix = list(ctx.meta[WORDS]), ctx.auto_envvar_prefix
    with ctx.command.make_context(
        ctx.info_name, words, parent=ctx.parent, auto_envvar_prefix=prefix
    ) as again:
        left_out = ("quiet", "verbose")  # `invoke` took these out of the first reading
        return {name: value for name, value in again.params.items() if name not in left_out}
