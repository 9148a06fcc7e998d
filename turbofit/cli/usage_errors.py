"""Answers wrong use of a command with a line of cause and a hint.

`unknown_options` answers options that a command does not have, by the first hint of
`hint_for_option`. `of_click` answers what click refuses: missing values, words too many, wrong
values of click's own types. `core.validation` answers wrong values of a request's fields.
presets/neighbours.yaml has the words of other programs, and turbofit's word for each.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Final

import click

from turbofit.cli.options.untyped import WORDS
from turbofit.core.errors import UsageError, option_of
from turbofit.core.messages import guess, near, neighbour, neighbours, of_other_server
from turbofit.core.units import grouped
from turbofit.serving.passthrough import engine_options

#: Options that every command has.
_EVERYWHERE: Final = ("--quiet", "--verbose", "--help")
#: The largest number of options that a hint lists completely.
_LISTED: Final = 12
#: The largest number of options with the same beginning that a hint names.
_MEANT: Final = 3


def of_click(exc: click.UsageError, ctx: click.Context) -> UsageError:
    """Return the error for what click refuses in a command line."""
    if isinstance(exc, click.BadParameter) and exc.param is not None:
        return _value_error(exc, exc.param, ctx)
    text, hint = exc.format_message().rstrip("."), f"see {ctx.command_path} --help"
    if isinstance(exc, click.BadOptionUsage):
        from turbofit.cli.manual import option_texts

        name, params = exc.option_name, ctx.command.params
        option = next(param for param in params if name in (*param.opts, *param.secondary_opts))
        what = getattr(option, "help", "") or option_texts(ctx.info_name or "").get(name)
        typed = name if getattr(option, "bare", False) else f"{name} {option.make_metavar(ctx)}"
        hint = f"{typed}: {what or 'a value behind it'}; {hint}"
    elif extra := re.search(r"unexpected extra arguments? \((.+)\)", text):
        arguments = {
            param.name for param in ctx.command.params if isinstance(param, click.Argument)
        }
        word_hint = neighbours()["arguments"].get(ctx.info_name) or unknown_word(
            extra[1].removeprefix("on ")
        )
        if "model" in arguments and word_hint.startswith("it is a model"):
            word_hint = (
                "one model at a time: two `turbofit serve MODEL --budget 45%` share a card, and"
                " turbofit gateway --models NAME=URL is one address for them"
            )
        elif not arguments and getattr(ctx.command, "takes_rest", False):
            word_hint = f"write the command after --: -- {extra[1]}"
        else:
            word_hint = f"{word_hint}{word_hint and '; '}put several words in quotes"
        hint = f"{word_hint}; {hint}"
    return UsageError(text[:1].lower() + text[1:], hint=hint)


def _value_error(exc: click.BadParameter, param: click.Parameter, ctx: click.Context) -> UsageError:
    """Return the error for a missing or a wrong value of an option or argument."""
    name, hint = max(param.opts, key=len), f"see {ctx.command_path} --help"
    if isinstance(param, click.Argument):
        name = param.make_metavar(ctx).strip("[].")
        hint = f"for example: {_example(ctx)}; {hint}"
    text = f"{name}: {exc.message.rstrip('.')}"
    if isinstance(param.type, click.IntRange):
        value = exc.message.partition(" is not ")[0].strip("'")
        most = "" if param.type.max is None else f", {param.type.max} or less"
        text = f"{name} {value!r}: it should be a whole number, {param.type.min} or more{most}"
    if isinstance(exc, click.MissingParameter):
        text = f"{name} is missing"
    return UsageError(text, hint=hint, options=[str(param.name)])


def _example(ctx: click.Context) -> str:
    """Return the command's example that has the most of the typed words; of several, the first."""
    from turbofit.cli.manual import MANUAL

    typed = {word for word in ctx.meta[WORDS] if not word.startswith("-")}
    examples = MANUAL[ctx.info_name or ""].examples
    return max(examples, key=lambda example: len(typed.intersection(example.split())))


def unknown_options(names: Sequence[str], ctx: click.Context) -> UsageError:
    """Return one error for all options that a command does not have, with each hint once."""
    other = f"see {ctx.command_path} --help"
    hints = grouped((hint_for_option(name, ctx) or other, name) for name in names)
    several = len(hints) > 1
    lines = [f"{', '.join(them)}: {hint}" if several else hint for hint, them in hints.items()]
    what = "unknown options" if len(names) > 1 else "unknown option"
    return UsageError(f"{what} {', '.join(names)}", hint="; ".join(lines))


def hint_for_option(name: str, ctx: click.Context) -> str:
    """Return a hint on an option that the command does not have; "" if there is none.

    The first of these hints: the command's argument of this name; the command's own option for an
    option of another program, by presets/neighbours.yaml; the command's options that begin with the
    name; the commands that have the option; the command's option with the nearest name; the hint on
    the nearest option of another server or of LMDeploy; all options, if the command has few.
    """
    name = name.replace("_", "-")
    params, command = ctx.command.params, ctx.info_name or ""
    own = [option for param in params for option in param.opts if option[:2] == "--"]
    fields = [str(param.name) for param in params]
    if hint := _of_argument(name[2:], ctx) or neighbour(name, fields, option_of, command):
        return hint
    if hint := of_other_server(name, option_of):
        return hint
    begun = [option for option in own if option.startswith(name)]
    if 0 < len(begun) <= _MEANT:
        return f"did you mean {' or '.join(begun)}?"
    if hint := _who_has(name, own, ctx) or guess(name, own):
        return hint
    programs = neighbours()["programs"].values()
    if alike := near(name, [*(f"--{it}" for rows in programs for it in rows), *engine_options()]):
        return f"did you mean {alike[0]}? {hint_for_option(alike[0], ctx)}"
    its = [option for option in own if option not in _EVERYWHERE]
    return f"its options are {', '.join(its)}" if len(its) <= _LISTED else ""


def _of_argument(word: str, ctx: click.Context) -> str:
    """Return the hint on an option that is named like an argument of the command; else ""."""
    arguments = [param for param in ctx.command.params if isinstance(param, click.Argument)]
    shown = " ".join(argument.make_metavar(ctx) for argument in arguments)
    named = word in re.findall("[a-z]+", shown.lower())
    return f"{word.upper()} stands without a name: {ctx.command_path} {shown}" if named else ""


def _who_has(name: str, own: Sequence[str], ctx: click.Context) -> str:
    """Return a hint on an option of other commands or of LMDeploy; "" for any other option."""
    having = [command for command, param in options_by_command(ctx) if name in param.opts]
    if "serve" in having and ctx.info_name == "batch":
        return (
            "a server's options stand behind --, as in turbofit batch INPUT OUTPUT --model MODEL --"
            " --pretend --on 1xl4; --url URL asks a server that runs"
        )
    if having:
        return f"turbofit {', '.join(having[:3])} {'have' if having[1:] else 'has'} it"
    if row := engine_options().get(name):
        here = next((option for option in row.as_ if option in own), "")
        return f"it is LMDeploy's; here: {here or f'turbofit serve MODEL {name}'}"
    return ""


def unknown_word(word: str) -> str:
    """Return a hint for a misplaced model, path or machine; "" for any other word."""
    from turbofit.machine.spec import is_spec
    from turbofit.model.names import names_a_model

    if names_a_model(word):
        name = word if " -" in word else shlex.quote(word)
        return f"it is a model: turbofit plan {name}, or turbofit serve {name}"
    if os.path.exists(word):
        return "it is a path: turbofit plan reads a checkpoint, report a plan, diagnose a log"
    if is_spec(word):
        on = shlex.quote(word)
        return f"it is a machine: turbofit plan MODEL --on {on}, or turbofit which --on {on}"
    return ""


def without_gpu(hint: str, ctx: click.Context) -> str:
    """Return the hint for a machine without a GPU.

    A command with the option ``--pretend`` gets a hint on this option, other commands get ``hint``.
    """
    if not any("--pretend" in param.opts for param in ctx.command.params):
        return hint
    return (
        "check nvidia-smi (in a container: --gpus all); without a GPU, --pretend --on 1xrtx3090"
        " runs on pretend GPUs, and turbofit plan MODEL --on SPEC plans for another machine"
    )


def options_by_command(ctx: click.Context) -> Iterator[tuple[str, click.Parameter]]:
    """Import all commands, and yield the name of each command with each of its options."""
    group = ctx.find_root().command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        for param in command.params if command is not None else ():
            if isinstance(param, click.Option):
                yield name, param
