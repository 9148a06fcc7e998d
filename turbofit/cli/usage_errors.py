"""Turns wrong use of a command into a line of cause and a hint."""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Final

import click

from turbofit.cli.terminal.output import say
from turbofit.core.errors import UsageError
from turbofit.core.process.hidden import without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.core.shell_line import ShellLine

#: Options that every command has.
_EVERYWHERE: Final = ("--quiet", "--verbose", "--help")
#: The largest number of options that a hint lists completely.
_LISTED: Final = 12
#: Commands that only list presets: the arguments of ``which`` that find more, and the result.
_LISTS: Final = {
    "models": "--on SPEC finds the models that a machine serves",
    "gpus": "MODEL finds the cards that serve a model",
}
#: The key of the words from which a context was made.
WORDS: Final = "turbofit.words"


def usage_error(exc: click.UsageError, ctx: click.Context) -> UsageError:
    """Turn click's error in a command line into a line of cause and a hint."""
    if isinstance(exc, click.NoSuchOption):
        return _unknown_option(exc.option_name, ctx)
    if isinstance(exc, click.BadParameter) and exc.param is not None:
        return _bad_value(exc, exc.param, ctx)
    text, hint = exc.format_message().rstrip("."), f"see {ctx.command_path} --help"
    if isinstance(exc, click.BadOptionUsage):
        hint = f"{_option_text(exc.option_name, ctx)}; {hint}"
    elif extra := re.search(r"unexpected extra arguments? \((.+)\)", text):
        model = any(argument.name == "model" for argument in _arguments(ctx))
        behind = not model and getattr(ctx.command, "takes_rest", False)
        known = f"a command stands behind --: -- {extra[1]}" if behind else unknown_word(extra[1])
        if model and known.startswith("it is a model"):
            known = (
                "one model at a time: two `turbofit serve MODEL --budget 45%` share a card, and"
                " turbofit gateway --models NAME=URL is one address for them"
            )
        hint = f"{known}; {hint}" if known else hint
    return UsageError(text[:1].lower() + text[1:], hint=hint)


def _bad_value(exc: click.BadParameter, param: click.Parameter, ctx: click.Context) -> UsageError:
    """The error for a value that is missing, or that an option or argument does not take."""
    from turbofit.cli.manual import MANUAL

    problem, hint = f": {exc.message.rstrip('.')}", f"see {ctx.command_path} --help"
    example = f"as {MANUAL[ctx.info_name or ''].examples[0]}; {hint}"
    if isinstance(exc, click.MissingParameter):
        problem, hint = " is missing", example
    elif isinstance(param.type, click.types.BoolParamType):
        value = exc.message.partition(" is not a valid boolean")[0]
        problem, hint = f": {value} is neither yes nor no", "give 1 for yes, 0 for no"
    elif isinstance(param, click.Argument):
        hint = example
    return UsageError(f"{_spelled(param, ctx)}{problem}", hint=hint)


def _option_text(name: str, ctx: click.Context) -> str:
    """How an option is typed, and what it is for."""
    from turbofit.cli.manual import option_texts

    params = ctx.command.params
    option = next(it for it in params if name in (*it.opts, *it.secondary_opts))
    what = getattr(option, "help", "") or option_texts(ctx.info_name or "").get(name)
    typed = name if getattr(option, "bare", False) else f"{name} {option.make_metavar(ctx)}"
    return f"{typed}: {what or 'a value behind it'}"


def as_ours(word: str, behind: str, ctx: click.Context) -> str:
    """Turn another program's option into the command's own, if value and meaning are equal.

    Several letters in one word, as in -vq, are left to click.

    Raises:
        UsageError: the command has no equal option.
    """
    from turbofit.core.synonyms import synonym

    name, equals, value = word.partition("=")
    meaning = synonym(name)
    if meaning is None and not word.startswith("--"):
        return word
    option = f"--{meaning.to}" if meaning else ""
    if not equals and not behind.startswith("-") and not (meaning and meaning.flag):
        value = behind
    if (
        meaning is None
        or not meaning.take
        or not _has(option, ctx)
        or not meaning.value_here(value)
    ):
        raise _unknown_option(name, ctx, value)
    say(f"{name} of {meaning.of} is taken as {option}{'; ' + meaning.say if meaning.say else ''}")
    return f"{option}{equals}{value if equals else ''}"


def _has(option: str, ctx: click.Context) -> bool:
    return any(option in param.opts for param in ctx.command.params)


def _unknown_option(name: str, ctx: click.Context, value: str = "") -> UsageError:
    """The error for an unknown option: its meaning in other programs, or near options here."""
    from turbofit.core.synonyms import synonym

    meaning = synonym(name)
    if meaning is None:
        hint = f"{_near_options(name, ctx)}see {ctx.command_path} --help"
        return UsageError(f"unknown option {name}", hint=hint)
    value = without_secrets([name, value])[1]
    form, command = "--{option} {value}", ctx.info_name or ""
    if meaning.to == "MODEL":
        taking = command if any(one.name == "model" for one in _arguments(ctx)) else "plan"
        form = f"turbofit {taking} {value or 'MODEL'}, without an option"
    elif meaning.to and not _has(f"--{meaning.to}", ctx):
        form = f"turbofit {_command_with(f'--{meaning.to}', ctx)} {form}"
    what = f"unknown option {name}{f' {value}' if value else ''}"
    return UsageError(what, hint=meaning.here(value, form))


def _near_options(name: str, ctx: click.Context) -> str:
    """A hint: who else has an option, the command's nearest option, or its short list."""
    from turbofit.core.synonyms import guess

    if known := _elsewhere(name, ctx):
        return f"{known}; "
    options = [
        option for param in ctx.command.params for option in param.opts if option[:2] == "--"
    ]
    if near := guess(name, options):
        return near
    its = [option for option in options if option not in _EVERYWHERE]
    return f"its options are {', '.join(its)}; " if len(its) <= _LISTED else ""


def _elsewhere(name: str, ctx: click.Context) -> str:
    """A hint on where a name exists that is no option here: an argument, a command, LMDeploy."""
    from turbofit.launch.serve.passthrough import engine_options

    word = rf"\b{re.escape(name.strip('-'))}\b"
    for argument in _arguments(ctx):
        if re.search(word, argument.make_metavar(ctx), re.IGNORECASE):
            usage = " ".join(ctx.get_usage().split()[1:])
            return f"{_spelled(argument, ctx)} stands without an option: {usage}"
    having = [command for command, param in options_by_command(ctx) if name in param.opts]
    if "which" in having and ctx.info_name in _LISTS:
        return f"turbofit which {_LISTS[ctx.info_name]}"
    if having:
        return f"turbofit {', '.join(having[:3])} {'have' if having[1:] else 'has'} it"
    if option := engine_options().get(name):
        here = next((word for word in option.as_ if _has(word, ctx)), "")
        return f"it is LMDeploy's; here: {here or f'turbofit serve MODEL {name}'}"
    return ""


def line_of_others(line: ShellLine, ctx: click.Context) -> UsageError:
    """The error for a line of another program; shows the same command in turbofit's words."""
    from turbofit.core.synonyms import command_synonym

    *program, command = line.of.split()
    hint = command_synonym(command) if program else None
    return UsageError(
        f"it is a line of {line.of}", hint=hint or _in_turbofits_words(line.words, ctx)
    )


def _in_turbofits_words(words: Sequence[str], ctx: click.Context) -> str:
    """A command of turbofit, with those words of another program that have a meaning here."""
    from turbofit.core.synonyms import synonym

    model, options, left = "", list[str](), without_secrets(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            model = model or word
            continue
        name, _, value = word.partition("=")
        meaning = synonym(name)
        names_model = meaning is not None and meaning.to == "MODEL"
        if not value and left and _is_value(left[0], name, bool(model) or names_model, ctx):
            value = left.pop(0)
        if _has(name, ctx):
            options += [name, value]
        elif names_model:
            model = value
        elif meaning is not None and _has(f"--{meaning.to}", ctx):
            options += [f"--{meaning.to}", meaning.value_here(value)]
    typed = shlex.join(filter(None, [model or "MODEL", *options]))
    return f"the same in turbofit: turbofit {ctx.info_name} {typed}"


def _is_value(word: str, name: str, has_model: bool, ctx: click.Context) -> bool:
    """Whether a word is an option's value, and not the model, which may still follow."""
    from turbofit.core.synonyms import synonym

    meaning, to = synonym(name), name
    if meaning is not None:
        to = f"--{meaning.to}"
    option = next((param for param in ctx.command.params if to in param.opts), None)
    is_flag = getattr(option, "is_flag", False) or (meaning is not None and meaning.flag)
    return not word.startswith("-") and not is_flag and (has_model or "/" not in word)


def all_unknown(errors: Sequence[UsageError]) -> UsageError:
    """One error for all options that a command does not have, with each hint once."""
    if len(errors) == 1:
        return errors[0]
    options = [error.message.removeprefix("unknown option ") for error in errors]
    hints: dict[str, list[str]] = {}
    for option, error in zip(options, errors, strict=True):
        hints.setdefault(error.hint, []).append(option.partition(" ")[0])
    hint = "; ".join(f"{', '.join(names)}: {hint}" for hint, names in hints.items())
    return UsageError(f"unknown options {', '.join(options)}", hint=hint)


def _arguments(ctx: click.Context) -> list[click.Argument]:
    return [param for param in ctx.command.params if isinstance(param, click.Argument)]


def _command_with(option: str, ctx: click.Context) -> str:
    """A command that has the option, with its argument."""
    having = [command for command, param in options_by_command(ctx) if option in param.opts]
    for command in ("plan", "serve"):
        if command in having:
            return f"{command} MODEL"
    return next(iter(having), "serve MODEL")


def unknown_word(word: str) -> str:
    """A hint for a word in a wrong place, by what it names; empty if nothing is known of it."""
    from turbofit.machine.spec import is_spec
    from turbofit.model.names import names_a_model

    if names_a_model(word):
        name = shlex.quote(word)
        return f"it is a model: turbofit plan {name}, or turbofit serve {name}"
    if os.path.exists(word):
        return "it is a path: turbofit plan takes a checkpoint's, report a plan's, diagnose a log's"
    if is_spec(word):
        on = shlex.quote(word)
        return f"it is a machine: turbofit plan MODEL --on {on}, or turbofit which --on {on}"
    return ""


def without_gpu(hint: str, ctx: click.Context) -> str:
    """A hint on what to do if no GPU can be read."""
    if not any("--pretend" in param.opts for param in ctx.command.params):
        return hint
    # A profile that names a machine names it for runs like these.
    on = "" if "on" in (ctx.default_map or {}) else " --on 1xrtx3090"
    return (
        f"check nvidia-smi (in a container: --gpus all); without a GPU, --pretend{on} tries it on "
        "pretend GPUs, and turbofit plan MODEL --on SPEC plans for another machine"
    )


def _spelled(param: click.Parameter, ctx: click.Context) -> str:
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return param.make_metavar(ctx).strip("[].")


def options_by_command(ctx: click.Context) -> Iterator[tuple[str, click.Parameter]]:
    """Each option of each command, all of which are imported to answer a wrong name."""
    group = ctx.find_root().command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        for param in command.params if command is not None else ():
            if isinstance(param, click.Option):
                yield name, param
