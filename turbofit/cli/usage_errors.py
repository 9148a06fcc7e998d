"""Wrong use, in a line of cause and a hint; where a value is from; variables that are none."""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from turbofit.cli.terminal.output import say
from turbofit.core.errors import UnknownModelError, UsageError
from turbofit.core.process.hidden import without_secrets
from turbofit.core.process.variable_names import PREFIX, VARIABLES, is_service_link

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


#: Arguments that take a model's name, too.
_MODELS: Final = ("model", "run", "fragments")
#: Options of every command.
_EVERYWHERE: Final = ("--quiet", "--verbose", "--help")
#: A command with no more options names them all.
_LISTED: Final = 12
#: Under which name a context keeps the words that it was made of.
WORDS: Final = "turbofit.words"
#: Quotes of other shells and of typography, which a shell here leaves in a word.
_QUOTES: Final = ("'", "\u2018", "\u2019", "\u201c", "\u201d", "\u201e")
#: The model in 4 bits that hints name, unless the line names another one.
_FOUR_BITS: Final = "internvl3-8b-awq"
#: Two dashes, as editors and web pages make them, or behind the space that a \\ leaves.
_DASHES: Final = r"(?s)^\s*(?:--|-?[\u2010-\u2015\u2212]-?)(?=[a-z][\w-]*(?:=.*)?\s*$)"


def usage_error(exc: click.UsageError, ctx: click.Context) -> UsageError:
    from turbofit.cli.manual import MANUAL, option_texts

    hint = f"see {ctx.command_path} --help"
    if isinstance(exc, click.NoSuchOption):
        return _unknown_option(exc.option_name, ctx)
    if isinstance(exc, click.BadParameter) and exc.param is not None:
        problem = f": {exc.message.rstrip('.')}"
        if isinstance(exc, click.MissingParameter):
            problem, hint = " is missing", f"as {MANUAL[ctx.info_name or ''].examples[0]}; {hint}"
        elif isinstance(exc.param.type, click.types.BoolParamType):
            value = exc.message.partition(" is not a valid boolean")[0]
            problem, hint = f": {value} is neither yes nor no", "give 1 for yes, 0 for no"
        elif isinstance(exc.param, click.Argument):
            hint = f"as {MANUAL[ctx.info_name or ''].examples[0]}; {hint}"
        return UsageError(f"{_spelled(exc.param, ctx)}{problem}", hint=hint)
    text = exc.format_message().rstrip(".")
    if isinstance(exc, click.BadOptionUsage):
        name = exc.option_name
        params = ctx.command.params
        option = next(it for it in params if name in (*it.opts, *it.secondary_opts))
        what = getattr(option, "help", "") or option_texts(ctx.info_name or "").get(name)
        typed = name if getattr(option, "bare", False) else f"{name} {option.make_metavar(ctx)}"
        hint = f"{typed}: {what or 'a value behind it'}; {hint}"
    if extra := re.search(r"unexpected extra arguments? \((.+)\)", text):
        known = _about_extra_words(extra[1], ctx)
        hint = f"{known}; {hint}" if known else hint
    return UsageError(text[:1].lower() + text[1:], hint=hint)


def _about_extra_words(extra: str, ctx: click.Context) -> str:
    """What to do instead of giving a command more words than it takes."""
    from turbofit.core.synonyms import by_its_words

    if getattr(ctx.command, "takes_rest", False):
        return f"a command stands behind --: -- {extra}"
    if text := by_its_words("words", ctx.info_name or ""):
        return _with_names(text, ctx)
    line = meant_line(ctx) if takes_model(ctx) else ""
    return f"as {line}" if line else unknown_word(extra)


def takes_model(ctx: click.Context) -> bool:
    return any(argument.name in _MODELS for argument in _arguments(ctx))


def _unknown_option(name: str, ctx: click.Context) -> UsageError:
    """Which option may be meant: another command's, LMDeploy's own, a near one, or any."""
    from turbofit.cli.manual import MANUAL
    from turbofit.core.synonyms import by_its_words, guess
    from turbofit.launch.serve.passthrough import engine_options

    what, command = f"unknown option {name}", ctx.info_name or ""
    commands = [command for command, option in options_by_command(ctx) if name in option.opts]
    known = [option for param in ctx.command.params for option in param.opts if option[:2] == "--"]
    alike = [other for other in known if name.startswith(f"{other}-")]
    if len(name) == 2:  # a letter
        alike = [other for other in known if other.startswith(f"-{name}")]
    if commands and name.startswith("--"):
        example = MANUAL[command].examples[0]
        has = f"turbofit {', '.join(commands[:3])} {'have' if commands[1:] else 'has'} it"
        hint = f"{has}; {ctx.info_name} is used as {example}; "
    elif name in engine_options():
        hint = f"it is LMDeploy's, for behind --: turbofit serve MODEL -- {name}; "
    elif hint := guess(name, known):
        pass
    elif instead := by_its_words(name, command):
        return UsageError(what, hint=instead)
    elif len(alike) in (1, 2):
        hint = f"did you mean {' or '.join(alike)}? "
    elif instead := by_its_words("option", command):
        return UsageError(what, hint=instead)
    elif len(options := [name for name in known if name not in _EVERYWHERE]) <= _LISTED:
        hint = f"its options are {', '.join(options)}; " if options else "it takes no options; "
    return UsageError(what, hint=f"{hint}see {ctx.command_path} --help")


def unknown_options(errors: list[UsageError], words: list[str], ctx: click.Context) -> UsageError:
    """One error of all options that a command does not have, and of what else is wrong in words."""
    hints: dict[str, list[str]] = {}
    options = [error.message.removeprefix("unknown option ") for error in errors]
    for option, error in zip(options, errors, strict=True):
        hints.setdefault(error.hint, []).append(option.partition(" ")[0])
    parts = [f"{', '.join(names)}: {hint}" for hint, names in hints.items()]
    hint = "; ".join(parts if len(hints) > 1 else hints)
    what = f"unknown option{'s' * (len(errors) > 1)} {', '.join(options)}"
    error = UsageError(what, hint=_with_names(hint, ctx))
    typed = zip(["", *words], words, strict=False)
    model = next((word for before, word in typed if "-" not in (before[:1], word[:1])), "")
    if not model or not takes_model(ctx):
        return error
    from turbofit.core.synonyms import command_synonym, synonym
    from turbofit.machine.spec import is_spec
    from turbofit.model.families.support import named_refusal
    from turbofit.model.names import unrunnable

    if refused := named_refusal(model) or unrunnable(model):
        error.message += f"; {refused.message}"
        error.hint += f"; {refused.hint}"
        return error
    machine = "".join(words[1:2])
    before = dict(zip(ctx.meta[WORDS][1:], ctx.meta[WORDS], strict=False)).get(machine, "")
    # The value of an option that nobody has is no machine.
    named = is_spec(machine) and (before[:1] != "-" or synonym(before) is not None)
    line = meant_line(ctx) if command_synonym(model) or named else ""
    error.hint += f"; in all: {line}" if line and line not in error.hint else ""
    return error


def _with_names(text: str, ctx: click.Context) -> str:
    """A hint with the models and machines of the line where it has a place, or an example."""
    from turbofit.model.names import named_in
    from turbofit.model.presets import find_preset, four_bits

    models, machines = named_in(" ".join(ctx.meta[WORDS]))
    preset = find_preset(models[0]) if models else None
    text = text.replace(_FOUR_BITS, (preset and four_bits(preset)) or _FOUR_BITS)
    text = text.replace("{models}", shlex.join(models or ["MODEL"]))
    return text.replace("{machines}", shlex.join(machines or ["SPEC"]))


def foreign_option(word: str, behind: str, ctx: click.Context) -> str:
    """The option that other programs' word is; else an error with what turbofit calls it.

    Letters and numbers are click's to read.
    """
    from turbofit.core.synonyms import synonym

    name, equals, value = word.partition("=")
    command = ctx.info_name or ""
    meaning = None if name[1:2].isdigit() else synonym(name, command)
    to, at = (meaning.to, meaning.at) if meaning else ("", {})
    if to != "MODEL" and command not in at:
        _refuse_argument(name, ctx)
    option = f"--{to.lower()}"
    options = {opt for param in ctx.command.params for opt in param.opts}
    here = option in options
    takes = to == "MODEL" and takes_model(ctx)
    # A letter of an engine means nothing where no engine is planned.
    no_engine = len(name) == 2 and "--tp" not in options
    known = here or takes or command in at
    if meaning is None or name == f"--{to}" or (not known and (meaning.only or no_engine)):
        if len(name) > 2 and name.startswith("--"):
            raise _unknown_option(name, ctx)
        return word  # several letters, as -vq, or a negative number
    if not equals:
        value = "" if behind.startswith("-") or meaning.flag else behind
    if meaning.take and here and (not meaning.values or meaning.value_here(value)):
        more = f"; {meaning.say}" if meaning.say else ""
        say(f"{name} of {meaning.of} is taken as {option}{more}")
        return f"{option}{equals}{value if equals else ''}"
    value = without_secrets([name, value])[1]
    what = f"unknown option {name}{f' {value}' if value else ''}"
    form = "--{option} {value}"
    if takes and (line := meant_line(ctx)):
        raise UsageError(what, hint=meaning.here(value, line.replace("{", "{{").replace("}", "}}")))
    if to == "MODEL" and not here:
        from turbofit.model.names import named_in

        value = next(iter(named_in(value)[0]), value)
        form = f"turbofit {command if takes else 'plan'} {value or 'MODEL'}, without an option"
    elif to and not here:
        form = f"turbofit {_command_with(option, ctx)} {form}"
    raise UsageError(what, hint=meaning.here(value, form))


def _arguments(ctx: click.Context) -> list[click.Argument]:
    return [param for param in ctx.command.params if isinstance(param, click.Argument)]


def _refuse_argument(name: str, ctx: click.Context) -> None:
    """Stop where an argument of the command, or one of its words, was typed as an option."""
    from turbofit.cli.manual import option_texts

    bare = name.strip("-") or name
    typed = {"-i": "IN", "-o": "OUT"}.get(name, rf"{re.escape(bare)}\b")
    for argument in _arguments(ctx):
        if bare in getattr(argument.type, "words", getattr(argument.type, "choices", ())):
            others = [word for word in ctx.meta[WORDS] if word != name]
            line = shlex.join(["turbofit", ctx.info_name or "", bare, *others])
            raise UsageError(f"unknown option {name}", hint=f"as {line}")
        if re.search(rf"\b{typed}", f"{argument.name} {argument.metavar}", re.IGNORECASE):
            usage = " ".join(ctx.get_usage().split()[1:])
            texts = option_texts(ctx.info_name or "")
            what = getattr(argument, "explained", "") or texts.get(argument.name or "", "")
            hint = f"{_spelled(argument, ctx)} stands without an option: {usage} ({what})"
            raise UsageError(f"unknown option {name}", hint=hint)


def mended(words: Sequence[str]) -> list[str]:
    """The words without what another shell left in them: ends of lines, a comment, quotes.

    A machine of several words is one, and so is what several ``--on`` name.
    """
    mended_words: list[str] = []
    left = [re.sub(_DASHES, "--", word) for word in words if word not in ("^", "\\", "`")]
    left = [part for word in left for part in re.split("(?<=^--on)=", word)]
    left = left[: left.index("#")] if "#" in left else left
    while left:
        word = left.pop(0)
        # Of a word with spaces a shell has read the quotes: those inside are meant.
        quoted = word[:1] in _QUOTES and not any(sign.isspace() for sign in word)
        if quoted and word[-1:] not in _QUOTES:
            end = next((at for at, other in enumerate(left, 1) if other[-1:] in _QUOTES), 0)
            word, left = " ".join([word, *left[:end]]), left[end:]
        if quoted and word[-1:] in _QUOTES:
            word = word[1:-1] or word
        if mended_words[-1:] == ["--on"]:
            word, left = _one_machine(word, left)
            before = mended_words.index("--on")
            if before < len(mended_words) - 1:
                word = f"{mended_words[before + 1]}+{word}"
                del mended_words[before : before + 2]
        mended_words.append(word)
    return mended_words


def _one_machine(first: str, left: list[str]) -> tuple[str, list[str]]:
    """The machine that begins with a word, and what stands behind it."""
    behind = next((at for at, word in enumerate(left) if word[:1] == "-"), len(left))
    if behind:
        from turbofit.machine.spec import is_spec

        for end in range(behind, 0, -1):
            for joint in (" ", "+"):
                if is_spec(machine := joint.join([first, *left[:end]])):
                    return machine, left[end:]
    return first, left


def meant_line(ctx: click.Context) -> str:
    """The line that a command's words mean in another order; empty without a model."""
    from turbofit.core.synonyms import synonym
    from turbofit.model.names import named_in

    options = {name: param for param in ctx.command.params for name in param.opts if name[0] == "-"}
    words = ctx.meta[WORDS]
    left = mended([part for word in words for part in (word.split() if " -" in word else [word])])
    texts: list[str] = []
    kept: list[str] = []
    while left:
        name, equals, value = left.pop(0).partition("=")
        if not name.startswith("-"):
            texts.append(f"{name}{equals}{value}")
            continue
        option, meaning = options.get(name), synonym(name, ctx.info_name or "")
        bare = getattr(option, "bare", meaning is None or meaning.flag)
        if left and not (equals or bare or left[0].startswith("-")):
            value = left.pop(0)
        value = without_secrets([name, value])[1]
        if name == "--on" or (meaning is not None and meaning.to == "MODEL"):
            texts.append(value)
        elif option is not None:
            kept += [name, value]
        elif meaning is not None and f"--{meaning.to}" in options:
            kept += [f"--{meaning.to}", meaning.value_here(value)]
    models, machines = named_in(" ".join(texts))
    if not models:
        return ""
    on = ["--on", "+".join(machines) or "SPEC"] if machines or "--on" in words else []
    on = on if "--on" in options else []
    return shlex.join(["turbofit", ctx.info_name or "", *models, *on, *filter(None, kept)])


def unknown_model_hint(exc: UnknownModelError, ctx: click.Context) -> str:
    """The line that is meant, and the word that it leaves out; else the error's hint."""
    if "did you mean" in exc.hint:
        return exc.hint
    line = meant_line(ctx)
    if not line:
        return exc.hint.replace("--on SPEC", f"--on {ctx.params.get('on') or 'SPEC'}")
    name = re.search(r"(?a) known as '([\w./-]+)'$", exc.message)
    if name and name[1].lower() not in line.lower():
        return f"as {line}, which leaves {name[1]} out"
    return f"as {line}"


def _command_with(option: str, ctx: click.Context) -> str:
    """A command that has the option, with its argument."""
    having = [command for command, param in options_by_command(ctx) if option in param.opts]
    for command in ("plan", "serve"):
        if command in having:
            return f"{command} MODEL"
    return "bench" if "bench" in having else next(iter(having), "serve MODEL --")


def unknown_word(word: str) -> str:
    """What to do with a word that stands where no such word can."""
    from turbofit.model.names import named_in

    models, machines = named_in(word)
    if models:
        return f"it is a model: turbofit plan {word}, or turbofit serve {word}"
    if os.path.exists(word):
        return "it is a path: turbofit plan takes a checkpoint's, report a plan's, diagnose a log's"
    if machines:
        on = shlex.quote(machines[0])
        return f"it is a machine: turbofit plan MODEL --on {on}, or turbofit which --on {on}"
    return ""


def without_gpu(hint: str, ctx: click.Context) -> str:
    """What to do where no GPU can be read."""
    if not any("--pretend" in param.opts for param in ctx.command.params):
        return hint
    # A profile that names a machine means it for such runs.
    on = "" if "on" in (ctx.default_map or {}) else " --on 1xrtx3090"
    return (
        f"check nvidia-smi (in a container: --gpus all); without a GPU, --pretend{on} tries it on "
        "pretend GPUs, and turbofit plan MODEL --on SPEC plans for another machine"
    )


def with_source(exc: UsageError, ctx: click.Context) -> UsageError:
    """The error, which says where options are from that the environment has."""
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


def _spelled(param: click.Parameter, ctx: click.Context) -> str:
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return param.make_metavar(ctx).strip("[].")


# ``TURBOFIT_COMMAND_OPTION``: every option's environment variable.


ROOT: Final = PREFIX.rstrip("_")
#: Commands for somebody who looks for an error; they have no options of their own.
_ALWAYS_ANSWER: Final = frozenset({"completion", "help", "version"})


def variable(prefix: str, option: click.Parameter) -> str:
    """``TURBOFIT_SERVE_TP`` of ``--tp`` and its command's prefix."""
    name = max(option.opts, key=len).lstrip("-")
    return f"{prefix}_{name.replace('-', '_').upper()}"


def check_names(ctx: click.Context) -> None:
    """Refuse names of ours that are neither a variable nor an option of the command.

    Options of other commands are theirs to check. A command that is read again was checked before.
    """
    from turbofit.core.synonyms import synonym

    group, here = ctx.find_root().command, f"{ctx.auto_envvar_prefix}_"
    if ctx.auto_envvar_prefix is None or not isinstance(group, click.Group):
        return
    if ctx.info_name in _ALWAYS_ANSWER:
        return
    known = {variable(here[:-1], param) for param in ctx.command.params if _has_variable(param)}
    others = tuple(f"{PREFIX}{name.upper()}_" for name in group.list_commands(ctx))
    for name, text in os.environ.items():
        if name.startswith("OLLAMA_") and ctx.info_name == "serve" and (meaning := synonym(name)):
            say(f"{name} is not read: {meaning.here(text, '--{option} {value}')}")
        elsewhere = name.startswith(others) and not name.startswith(here)
        if not name.startswith(PREFIX) or elsewhere or name in known or name in VARIABLES:
            continue
        if not is_service_link(name, text):
            raise UsageError(
                f"{name} is neither a variable nor an option of turbofit",
                hint=_hint(name, known, ctx),
            )


def _has_variable(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and param.allow_from_autoenv


def options_by_command(ctx: click.Context) -> Iterator[tuple[str, click.Parameter]]:
    """Each option of each command, all of which are imported: for the answer to a wrong name."""
    group = ctx.find_root().command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        for param in command.params if command is not None else ():
            if isinstance(param, click.Option):
                yield name, param


def _hint(name: str, known: Iterable[str], ctx: click.Context) -> str:
    """What a name is here that is known elsewhere, or the nearest right one."""
    from turbofit.core.synonyms import guess, synonym

    here = f"{ctx.auto_envvar_prefix}_"
    bare = name.removeprefix(here)
    if name != bare and (meaning := synonym(bare)):
        return meaning.here(os.environ[name], f"{here}{{variable}}={{value}}")
    options = (
        (command, param) for command, param in options_by_command(ctx) if _has_variable(param)
    )
    every = (variable(f"{PREFIX}{command.upper()}", param) for command, param in options)
    # Without the prefix, by which all names are alike.
    right = sorted(other.removeprefix(PREFIX) for other in {*known, *VARIABLES, *every})
    meant = guess(name.removeprefix(PREFIX), right, of=PREFIX)
    return f"{meant}See docs/environment.md; options are {PREFIX}COMMAND_OPTION"
