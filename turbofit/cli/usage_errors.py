"""click's errors in turbofit's form: a line of cause, a hint, and where a value is from."""

from __future__ import annotations

import click

from turbofit.cli.options.option_variables import named_source
from turbofit.core.errors import UsageError

__all__ = ["usage_error", "with_source"]


def usage_error(exc: click.UsageError, ctx: click.Context) -> UsageError:
    """Turbofit's form of one of click's errors."""
    hint = f"see {ctx.command_path} --help"
    if isinstance(exc, click.NoSuchOption):
        near = exc.possibilities or []
        return UsageError(
            f"unknown option {exc.option_name}",
            hint=f"did you mean {near[0]}? {hint}" if near else hint,
        )
    if isinstance(exc, click.MissingParameter) and exc.param is not None:
        return UsageError(f"{_spelled(exc.param, ctx)} is missing", hint=hint)
    if isinstance(exc, click.BadParameter) and exc.param is not None:
        if isinstance(exc.param.type, click.types.BoolParamType):
            what = exc.message.partition(" is not a valid boolean")[0]
            return UsageError(
                f"{_spelled(exc.param, ctx)}: {what} is neither yes nor no",
                hint="give 1 for yes, 0 for no",
            )
        return UsageError(f"{_spelled(exc.param, ctx)}: {exc.message.rstrip('.')}", hint=hint)
    text = exc.format_message().rstrip(".")
    return UsageError(text[:1].lower() + text[1:], hint=hint)


def with_source(exc: UsageError, ctx: click.Context) -> UsageError:
    """The error, which says of an option of the environment that it is from there."""
    said = named_source(ctx, exc.message)
    if said:
        exc.hint = f"{exc.hint} ({said})"
    return exc


def _spelled(param: click.Parameter, ctx: click.Context) -> str:
    """As a person types it."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return param.make_metavar(ctx).strip("[].")
