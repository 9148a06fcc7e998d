"""click's commands in turbofit's form: help in groups, errors with a hint, words after ``--``."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import click

from turbofit.cli import usage_errors
from turbofit.cli.options.untyped import WORDS, check_names, with_source
from turbofit.cli.terminal.output import PAGE_WIDTH, Form, answer, progress, say, verbose_log
from turbofit.core.errors import NoGpuError, UsageError
from turbofit.core.process.variable_names import is_service_address
from turbofit.serving.passthrough import (
    EngineOption,
    engine_options,
    full_name,
    is_option,
    sort_options,
    take_values,
)

#: The name of LMDeploy's server: the last word of its command, or a module that Python runs. vLLM's
#: line is read as well, so that each of its options is answered.
_COMMAND: Final = re.compile(r"(?:.*/)?lmdeploy serve api_server|(?:.*[ /])?vllm serve")
_MODULE: Final = re.compile(r"lmdeploy\.serve\.(?:openai\.)?api_server")
_VARIABLE: Final = re.compile(r"((?:CUDA|HF|LMDEPLOY|NCCL|TM)_\w+)=([^$]*)")
_OF_PROGRAM: Final = re.compile(
    r"python[\d.]*|-m|(?:.*/)?(?:lmdeploy|vllm)(?:\.\S+)?|serve|api_server"
)


class TypedOption(Protocol):
    """An option: if ``bare`` it may have no value; if ``several`` it takes several words."""

    bare: bool
    several: bool


class Typed(NamedTuple):
    """The words of a command line, sorted by the program that they are for.

    ``words`` are turbofit's own, in click's form; ``passed`` are LMDeploy's options for the engine.
    ``variables`` are the environment variables that the line sets. ``notes`` are sentences on what
    became of LMDeploy's words. ``unknown`` are options that neither turbofit nor LMDeploy has.
    ``in_place``: the line names LMDeploy's server, in whose place turbofit runs.
    """

    words: list[str]
    passed: list[str]
    variables: dict[str, str]
    notes: list[str]
    unknown: list[str]
    in_place: bool = False


def read(
    words: Sequence[str], options: Mapping[str, TypedOption], *, plans: bool, serves: bool
) -> Typed:
    """Sort the words before ``--`` into turbofit's own and LMDeploy's.

    ``options`` are the command's own options, by each of their names. ``plans``: LMDeploy's options
    may stand among the words. ``serves``: the command starts engines, which get LMDeploy's options.

    Raises:
        UsageError: an option of LMDeploy lacks its value, or no plan can take it into account.
        click.BadOptionUsage: an option stands where the value of another option should be.
    """
    typed = _pasted(words) if plans else Typed(list(words), [], {}, [], [])
    reader, left = _Reader(options, typed, serves=serves), list(typed.words)
    while left:
        word = left.pop(0)
        written, equals, value = word.partition("=")
        name, given = full_name(written, options) if plans else written, [value] if equals else []
        if name in options:
            reader.take_own(name, given, left)
        elif not is_option(word) or _are_letters(word, options):
            reader.own.append(word)
        elif plans and (row := engine_options().get(name)):
            reader.take_lmdeploys(name, row, given or take_values(left, row.values, written))
        else:
            typed.unknown.append(written)
    if not serves:
        sort_options(typed.passed)  # refuses options that no plan counts
        typed.passed.clear()
    return typed._replace(words=reader.words(), notes=[*typed.notes, *reader.notes()])


class _Reader:
    """Takes the options of a command line one by one, and notes what became of LMDeploy's."""

    def __init__(self, options: Mapping[str, TypedOption], typed: Typed, *, serves: bool) -> None:
        self._options, self._typed, self._serves = options, typed, serves
        self.own: list[str] = []
        self._lists: dict[str, list[str]] = {}
        self._said: dict[str, list[str]] = {}

    def take_own(self, name: str, given: list[str], left: list[str]) -> None:
        """Take an option of turbofit; its value is in ``given``, or else first in ``left``."""
        option = self._options[name]
        if option.several:
            self._lists.setdefault(name, []).extend(given or take_values(left, "*", name))
            return
        if name == "--on" and name in self.own:
            hint = "one machine of unequal cards is `--on A+B`"
            raise UsageError("`--on` is given twice", hint=hint)
        self.own.append("=".join([name, *given]))
        if left and not given and not option.bare:
            if is_option(left[0]):
                raise click.BadOptionUsage(name, f"{name} needs a value before {left[0]}")
            self.own.append(left.pop(0))

    def take_lmdeploys(self, name: str, row: EngineOption, values: list[str]) -> None:
        """Pass an option of LMDeploy to the engine, make it turbofit's option, or leave it out."""
        self._said.setdefault(self._taken(name, row, values), []).append(name)

    def _taken(self, name: str, row: EngineOption, values: list[str]) -> str:
        if row.default is not None and values == [row.default]:
            return f"{values[0]} left out: LMDeploy's own default"
        if row.variables:
            self._typed.variables.update(dict.fromkeys(row.variables, values[0]))
            return f"as {' and '.join(row.variables)}"
        targets = [word.partition("=")[0] for word in row.as_]
        heeded = self._serves if row.is_ == "passed" else set(targets) <= set(self._options)
        if not heeded:
            return "without effect on the plan"
        if row.is_ != "taken":
            self._typed.passed.extend([name, *values])
            return "for the engine" if row.is_ == "passed" else ""
        for word in map(os.path.expandvars, row.as_):
            self.own += [it for value in values for it in (word, value)] if row.values else [word]
        self.own += row.in_place if self._typed.in_place else ()
        return f"as {' and '.join(targets)}" if targets else f"left out: {row.say}"

    def words(self) -> list[str]:
        """Return turbofit's own words in click's form: ``--option a --option b`` for a list."""
        words = list(self.own)
        for name, values in self._lists.items():
            words += [word for value in values for word in (name, value)] or [name]
        return words

    def notes(self) -> list[str]:
        """Return a sentence on what became of LMDeploy's options, if there are any."""
        parts = [f"{', '.join(names)} {what}" for what, names in self._said.items() if what]
        return [f"as LMDeploy's: {'; '.join(parts)}"] if parts else []


def _pasted(words: Sequence[str]) -> Typed:
    """Cut a pasted command line of LMDeploy's server down to its arguments and variables."""
    for at, word in enumerate(words):
        if re.search("api_server|vllm serve", word) and len(word.split()) > 1:
            try:
                line = shlex.split(os.path.expandvars(re.sub(r"\\\s*\n", " ", word)))
            except ValueError as exc:
                raise UsageError(f"the pasted line: {exc}", hint="paste the whole line") from None
            if end := _end_of_program(line):
                return _cut(line[:end], [*words[:at], *line[end:], *words[at + 1 :]])
    end = _end_of_program(words)
    if any(word.startswith("-") and word != "-m" for word in words[:end]):
        end = 0  # options of turbofit, one of which has the value api_server
    return _cut(words[:end], list(words[end:]))


def _end_of_program(words: Sequence[str]) -> int:
    """Return the index of the first word after the name of LMDeploy's server; 0 without a name."""
    for at, word in enumerate(words):
        whole = " ".join(words[max(0, at - 2) : at + 1])
        if _COMMAND.fullmatch(whole) or _MODULE.fullmatch(word) or whole == "api_server":
            return at + 1
    return 0


def _cut(before: Sequence[str], words: list[str]) -> Typed:
    found = [match for word in before if (match := _VARIABLE.fullmatch(word))]
    left_out = len(found) < sum(not _OF_PROGRAM.fullmatch(word) for word in before)
    notes = ["left out: what else stands before lmdeploy serve api_server"] if left_out else []
    in_place = "".join(before[-1:]).endswith("api_server")
    return Typed(words, [], {match[1]: match[2] for match in found}, notes, [], in_place)


def _are_letters(word: str, options: Mapping[str, TypedOption]) -> bool:
    """Return whether a word is several short options in one, such as -vq, which click splits."""
    return word[1:2] != "-" and all(f"-{letter}" in options for letter in word[1:])


_WINDOWS: Final = os.name == "nt"
#: The key of the words that a context was made of, sorted.
TYPED: Final = "turbofit.typed"
_GPUS: Final = "CUDA_VISIBLE_DEVICES"


class _Path(click.Path):
    """A path as an option's value; ~ is expanded even in quotes. The command checks the path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


PATH: Final = _Path(readable=False)


class Option(click.Option):
    """A click option in a named group of the help page; the first group has no name.

    ``several``: the option takes all words up to the next option, like LMDeploy's options.
    ``form``: the option sets the form of the answer, such as JSON; a command takes one such option,
    which has no environment variable. ``usual`` is the default as the help page shows it. If no
    ``help`` is given, the text is from presets/options.yaml.
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
        #: Whether it may stand without a value.
        self.bare = self.is_flag or self.count or "flag_value" in attributes

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the text of the option's variable; None if Kubernetes set it for a Service."""
        text = super().resolve_envvar_value(ctx)
        return None if text is None or is_service_address(text) else text


class Argument(click.Argument):
    """A click argument; ``explained`` is its text on the help page.

    If no text is given, the text is from presets/options.yaml.
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
    ``first`` are the options of the help page's first section, before options in groups;
    ``unnamed`` are the options that the help page leaves out. ``only_linux``: on Windows the
    command runs only with ``--dry-run``, and it never waits for the reader of its standard error.
    ``usage`` replaces click's first line of the help.
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
            "-v", "--verbose", count=True, help="what is done, on stderr; -vv: each step of it"
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
        #: Whether a command line of LMDeploy's server may follow it.
        self.plans = any("--session-len" in param.opts for param in params)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words before ``--``; a command that plans may have LMDeploy's options there."""
        ctx.meta.setdefault(WORDS, tuple(args))
        words, rest = split_rest(args)
        if ctx.resilient_parsing:
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
                raise usage_errors.unknown_options(typed.unknown, ctx)
            left = super().parse_args(ctx, typed.words)
        except click.UsageError as exc:
            raise with_source(usage_errors.of_click(exc, ctx), ctx) from None
        if self.takes_rest:
            ctx.params["rest"] = [*typed.passed, *rest]
        _choose_gpus(typed, ctx)
        ctx.meta[TYPED] = typed
        check_names(ctx)
        self._check_forms(ctx)
        return left

    def _check_forms(self, ctx: click.Context) -> None:
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
        if _WINDOWS and self.only_linux and not ctx.params.get("dry_run"):
            raise UsageError(
                f"{ctx.command_path} does not run on Windows",
                hint="run it on Linux, or in WSL 2; plan, predict, machine and report work here",
            )
        form, typed = ctx.params.get("form", Form()), ctx.meta.get(TYPED)
        if self.only_linux:
            from turbofit.core.process.log_queue import queued_stderr  # it imports logging
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

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing: `format_options` writes the arguments."""

    def explain(self, name: str) -> None:
        """Add help texts from presets/options.yaml to options and arguments that have none."""
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
        from turbofit.cli.manual import group_lines

        self.explain(ctx.info_name or "")
        arguments = [it for it in self.params if isinstance(it, Argument)]
        options = [it for it in self.params if isinstance(it, Option)]
        groups: dict[str, list[tuple[str, str]]] = {}
        if arguments:
            groups["arguments"] = [(it.make_metavar(ctx), it.explained) for it in arguments]
        order = {name: place for place, name in enumerate(self.first)}
        for option in sorted(options, key=lambda it: order.get(str(it.name), len(order))):
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
                formatter.write_text("taken too: lmdeploy serve api_server --help lists them")

    def _group_of(self, option: Option) -> str:
        """Return the heading above an option; those that come first have their command's."""
        if option.name in self.first:
            return ""
        return option.group or ("more" if self.first else "")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from turbofit.cli.manual import manual_text

        formatter.write(manual_text(ctx.info_name or ""))


def _choose_gpus(typed: Typed, ctx: click.Context) -> None:
    """With ``--on``, use CUDA_VISIBLE_DEVICES of a pasted line as ``--gpus`` if that is missing."""
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


def split_rest(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before ``--``, and the words after it."""
    before = list(arguments)
    if "--" not in before:
        return before, []
    at = before.index("--")
    return before[:at], before[at + 1 :]
