"""Commands and options of click in turbofit's form: groups in the help, a hint in each error."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Final

import click

from turbofit.cli import usage_errors
from turbofit.cli.options.untyped import WORDS, check_names, with_source
from turbofit.cli.terminal import screen
from turbofit.cli.terminal.output import PAGE_WIDTH, Form, answer, progress, say, verbose_log
from turbofit.cli.words import TYPED, Typed, read, split_rest
from turbofit.core.errors import NoGpuError, UsageError
from turbofit.core.process.variables import is_service_address
from turbofit.serving.passthrough import refused_options, together

_GPUS: Final = "CUDA_VISIBLE_DEVICES"


#: The type of an option whose value is a path: click checks nothing, since the command does.
PATH: Final = click.Path(readable=False)


class Option(click.Option):
    """A click option in a named group of the help page; the first group has no name.

    ``several``: the option takes all words up to the next option, like LMDeploy's options.
    ``form``: the option sets the form of the answer, such as JSON. A command line may have one
    option with ``form``, and no environment variable sets an option with ``form``. ``usual`` is the
    default as the help page shows it. Without ``help``, the text is from presets/options.yaml.
    """

    def __init__(
        self,
        *names: str,
        group: str = "",
        several: bool = False,
        form: bool = False,
        usual: str = "",
        **attributes: Any,
    ) -> None:
        if several:
            attributes["multiple"] = True
        if form:
            attributes["allow_from_autoenv"] = False
        super().__init__(names, **attributes)
        self.group = group
        self.several = several
        self.form = form
        self.usual = usual
        #: Whether the option may stand without a value.
        self.bare = self.is_flag or self.count or "flag_value" in attributes

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the value of the option's environment variable, unless Kubernetes set it.

        For a Service ``turbofit-serve`` Kubernetes sets the variable of the option ``--port``.
        """
        text = super().resolve_envvar_value(ctx)
        return None if text is None or is_service_address(text) else text


class Argument(click.Argument):
    """A click argument; ``explained`` is its text on the help page.

    By default, the text is from presets/options.yaml.
    """

    def __init__(self, name: str, *, explained: str = "", **attributes: Any) -> None:
        super().__init__([name], **attributes)
        self.explained = explained


def _print_help(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        answer(ctx.get_help() + "\n")
        ctx.exit()


class CliCommand(click.Command):
    """One command of the command line; ``callback`` takes every option by its name.

    ``takes_rest``: words after ``--`` are for another program, and are passed on as ``rest``.
    ``first`` are the options of the help page's first section, before options in groups.
    ``unnamed`` are the options that the help page leaves out. ``usage`` replaces click's first line
    of the help.

    ``only_linux``: on Windows the command runs only with ``--dry-run``. On Linux a thread writes
    its standard error, so that the command goes on if nobody reads it.
    """

    def __init__(
        self,
        callback: Callable[..., int],
        params: Sequence[click.Parameter],
        *,
        takes_rest: bool = False,
        only_linux: bool = False,
        first: Sequence[str] = (),
        unnamed: Sequence[str] = (),
        usage: str | None = None,
    ) -> None:
        verbose = Option(
            "-v", "--verbose", count=True, help="print what is done on stderr; -vv: print each step"
        )
        quiet = Option("-q", "--quiet", is_flag=True, help="no progress on stderr")
        show_help = Option(
            "-h", "--help", is_flag=True, is_eager=True, expose_value=False, callback=_print_help,
            help="this page", allow_from_autoenv=False,
        )  # fmt: skip
        super().__init__(
            None,
            callback=callback,
            params=[*params, quiet, verbose, show_help],
            context_settings={"terminal_width": PAGE_WIDTH, "max_content_width": PAGE_WIDTH},
            add_help_option=False,
        )
        self.takes_rest = takes_rest
        self.only_linux = only_linux
        self.first, self.unnamed = first, unnamed
        self.usage = usage
        #: Whether a command line of LMDeploy's server may follow the command.
        self.plans = any("--session-len" in param.opts for param in params)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words before ``--``; a command that plans also reads LMDeploy's options."""
        ctx.meta.setdefault(WORDS, tuple(args))
        words, rest = split_rest(args)
        if ctx.resilient_parsing:  # a shell asks for completions: a wrong word is no error
            return super().parse_args(ctx, words)
        if rest and not self.takes_rest:
            raise UsageError(
                f"`{ctx.command_path}` takes nothing after --",
                hint=f"see {ctx.command_path} --help",
            )
        options = [param for param in self.params if isinstance(param, Option)]
        by_name = {name: one for one in options for name in (*one.opts, *one.secondary_opts)}
        try:
            typed = read(words, by_name, plans=self.plans, serves=self.takes_rest)
            if typed.unknown:
                unknown = usage_errors.unknown_options(typed.unknown, ctx)
                raise together([unknown, *refused_options(typed.passed)])
            remaining = super().parse_args(ctx, typed.words)
        except click.UsageError as exc:
            raise with_source(usage_errors.of_click(exc, ctx), ctx) from None
        if self.takes_rest:
            ctx.params["rest"] = [*typed.passed, *rest]
        _choose_gpus(typed, ctx)
        ctx.meta[TYPED] = typed
        check_names(ctx)
        self._check_forms(ctx)
        return remaining

    def _check_forms(self, ctx: click.Context) -> None:
        """Refuse two options for the answer's form; pass the form to the command as ``form``."""
        forms = [param for param in self.params if isinstance(param, Option) and param.form]
        given = [option.opts[0] for option in forms if ctx.params[option.name or ""]]
        if len(given) > 1:
            raise UsageError(
                f"{given[0]} and {given[1]} do not go together", hint="give one of the two"
            )
        if forms:
            fields = {name: ctx.params.pop(name) for name in Form._fields if name in ctx.params}
            ctx.params["form"] = Form(**fields)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with progress and log on stderr; errors say where options come from."""
        if screen.WINDOWS and self.only_linux and not ctx.params.get("dry_run"):
            raise UsageError(
                f"{ctx.command_path} does not run on Windows",
                hint="run it on Linux, or in WSL 2; plan, predict, machine and report work here",
            )
        form, typed = ctx.params.get("form", Form()), ctx.meta.get(TYPED)
        if self.only_linux:
            # Not at the top: this loads logging, which other commands do without.
            from turbofit.serving.process.log_queue import queued_stderr
        try:
            with (
                queued_stderr() if self.only_linux else nullcontext(),
                progress(quiet=ctx.params.pop("quiet"), as_json=form.as_json),
                verbose_log(ctx.params.pop("verbose")),
            ):
                if typed is not None:
                    os.environ.update(typed.variables)
                    for line in typed.notes:
                        say(line)
                return super().invoke(ctx)
        except UsageError as exc:
            with_source(exc, ctx)
            raise
        except NoGpuError as exc:
            exc.hint = usage_errors.without_gpu(exc.hint, ctx)
            raise

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.usage is None:
            super().format_usage(ctx, formatter)
        else:
            formatter.write_usage(ctx.command_path, self.usage)

    def explain(self, name: str) -> None:
        """Give options and arguments without a help text the text of presets/options.yaml."""
        from turbofit.cli.manual import option_texts

        texts = option_texts(name)
        for param in self.params:
            if isinstance(param, Argument):
                param.explained = param.explained or texts[param.name or ""]
            elif isinstance(param, Option):
                param.help = (param.help or texts[max(param.opts, key=len)]) + param.usual
                param.usual = ""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        self.explain(ctx.info_name or "")
        return super().shell_complete(ctx, incomplete)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help page's arguments, and its options by their groups."""
        from turbofit.cli.manual import group_lines

        self.explain(ctx.info_name or "")
        arguments = [param for param in self.params if isinstance(param, Argument)]
        options = [param for param in self.params if isinstance(param, Option)]
        groups: dict[str, list[tuple[str, str]]] = {}
        if arguments:
            groups["arguments"] = [
                (param.make_metavar(ctx), param.explained) for param in arguments
            ]
        order = {name: place for place, name in enumerate(self.first)}
        for option in sorted(options, key=lambda param: order.get(str(param.name), len(order))):
            group = self._group_of(option)
            if option.name not in self.unnamed:
                record = option.get_help_record(ctx) or ("", "")
                groups.setdefault(group, []).append(record)
        lines = group_lines()
        for group, records in groups.items():
            line = f" ({lines[group]})" if group in lines else ""
            title = group or "options"
            with formatter.section(f"{title[0].upper()}{title[1:]}{line}"):
                formatter.write_dl(records, col_max=36)
        if self.unnamed:
            with formatter.section("LMDeploy's own options"):
                formatter.write_text("every option that lmdeploy serve api_server --help lists")

    def _group_of(self, option: Option) -> str:
        """Return the heading above an option; "" for one of the command's first options."""
        if option.name in self.first:
            return ""
        return option.group or ("more" if self.first else "")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from turbofit.cli.manual import manual_text

        formatter.write(manual_text(ctx.info_name or ""))


def _choose_gpus(typed: Typed, ctx: click.Context) -> None:
    """With ``--on``, use a pasted line's CUDA_VISIBLE_DEVICES as ``--gpus``.

    If ``--gpus`` is given, too, the line's variable is left out. A note says what became of it.
    """
    if _GPUS in typed.variables and ctx.params.get("on") and "gpus" in ctx.params:
        value, given = typed.variables.pop(_GPUS), ctx.params["gpus"]
        if given is None:
            ctx.params["gpus"] = value
        what = f"taken as --gpus {value}" if given is None else "left out: --gpus is given"
        typed.notes.append(f"{_GPUS}={value} of the line is {what}")


def command(*params: click.Parameter, **options: Any) -> Callable[[Callable[..., int]], CliCommand]:
    """Make a decorator that turns a function into a `CliCommand`.

    >>> @command(Option("--json", is_flag=True, help="one JSON document on stdout"))
    ... def gpus(json: bool) -> int: ...
    """
    return partial(CliCommand, params=params, **options)
