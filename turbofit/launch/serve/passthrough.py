"""The options of `lmdeploy serve api_server`: what turbofit does with each, on any line.

``presets/engines/lmdeploy-options.yaml`` is the table: an option is planned, replaced by one of
turbofit, passed to the engine, or refused. It is read only for words that are no option of
turbofit.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cache
from itertools import takewhile
from typing import Final, Literal

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.presets import converted, load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.core.synonyms import synonym
from turbofit.core.version import REFERENCE

#: Said of an option that a plan ignores.
_NO_PART: Final = "without effect on the plan"


class EngineOption(Struct, rename={"is_": "is", "as_": "as"}, forbid_unknown_fields=True):
    """A row of the table, which describes the fields."""

    is_: Literal["planned", "taken", "passed", "refused", "undecided"]
    values: int | str
    as_: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    chosen: bool = False
    clients: bool = False
    always: bool = False
    default: str | None = None
    why: str = "it changes memory in ways that no plan counts"
    way: str = "leave it out, or take the risk with turbofit serve --unplanned"
    say: str = ""
    until: str | None = None


class _Table(Struct):
    lacks: dict[str, tuple[str, ...]]
    fields: frozenset[str]
    options: dict[str, EngineOption]


class PassedOptions(msgspec.Struct):
    """LMDeploy's options, sorted: those to plan with, those to pass on, the API keys in these.

    ``public``: the passed options that are about clients, which would meet a gateway instead.
    """

    modelled: list[str] = []
    argv: list[str] = []
    api_keys: list[str] = []
    unplanned: list[str] = []
    public: list[str] = []
    model_name: str | None = None


class LmdeployWords(msgspec.Struct):
    """A line's words: turbofit's own, the engine's, and what was done with each option."""

    ours: list[str] = []
    engine: list[str] = []
    said: dict[str, list[str]] = {}

    @property
    def line(self) -> str:
        """A sentence on LMDeploy's options; empty if every word was turbofit's."""
        parts = [f"{', '.join(names)} {what}" for what, names in self.said.items() if what]
        return f"as LMDeploy's: {'; '.join(parts)}" if parts else ""


@cache
def option_table() -> _Table:
    path = preset_path("engines", "lmdeploy-options")
    return converted(load_yaml(path), _Table, path)


def engine_options() -> dict[str, EngineOption]:
    return option_table().options


def uncounted_fields() -> frozenset[str]:
    """Fields of LMDeploy's engine configs that change memory in ways that no plan counts."""
    refused = (name for name, option in engine_options().items() if option.is_ == "refused")
    return option_table().fields | {name.lstrip("-").replace("-", "_") for name in refused}


def read_words(words: Sequence[str], known: Collection[str], *, serves: bool) -> LmdeployWords:
    """Sort a line's words; ``known`` are the command's own options, unknown words stay with it.

    ``serves``: the command starts engines, which receive the passed options.

    Raises:
        UsageError: an option lacks its value.
    """
    read, rest = LmdeployWords(), list(words)
    while rest:
        word = rest.pop(0)
        written, equals, value = word.partition("=")
        name = written if written in known else _full_name(written, known)
        option = None if name in known else engine_options().get(name)
        if option is None:
            read.ours.append(f"{name}{equals}{value}")
            continue
        values = [value] if equals else _take(rest, option.values, written)
        _place(read, name, option, values, known, serves=serves)
    return read


def _place(
    read: LmdeployWords,
    name: str,
    option: EngineOption,
    values: list[str],
    known: Collection[str],
    *,
    serves: bool,
) -> None:
    if option.default is not None and values == [option.default]:
        what = f"{values[0]} left out: LMDeploy's own default"
    elif option.is_ == "taken":
        what = _taken(read, option, values, known)
    elif option.is_ == "passed" and not serves:
        what = _NO_PART
    else:
        read.engine += [name, *values]
        what = "for the engine" if option.is_ == "passed" else ""
    read.said.setdefault(what, []).append(name)


def _taken(
    read: LmdeployWords, option: EngineOption, values: list[str], known: Collection[str]
) -> str:
    """Translate an option into turbofit's, if the command has it; returns words on the result."""
    targets = [word.partition("=")[0] for word in option.as_]
    if option.variables:
        os.environ.update(dict.fromkeys(option.variables, values[0]))
        return f"as {' and '.join(option.variables)}"
    if not set(targets) <= set(known):
        return _NO_PART
    for word in map(os.path.expandvars, option.as_):
        pairs = [part for value in values for part in (word, value)]
        read.ours += pairs if option.values else [word]
    return f"as {' and '.join(targets)}" if targets else f"left out: {option.say}"


def sort_options(arguments: Sequence[str], *, unplanned: bool = False) -> PassedOptions:
    """Sort LMDeploy's options; with ``unplanned``, options that no plan counts may pass.

    Raises:
        UsageError: turbofit sets the option, cannot model it, or LMDeploy does not have it.
    """
    options, passed, rest = engine_options(), PassedOptions(), list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            raise UsageError(f"{word!r} after -- is not an option", hint="name the model before --")
        written, equals, value = word.partition("=")
        name = _full_name(written, ())
        option = options.get(name)
        values = [value] if equals else _take(rest, option.values if option else "*", written)
        _sort(passed, name, option, values, unplanned)
    return passed


def adapter_names(argv: Sequence[str]) -> list[str]:
    """Clients' names of the adapters in LMDeploy's options, which are NAME=PATH or a path."""
    words = list(argv)
    names: list[str] = []
    while "--adapters" in words:
        del words[: words.index("--adapters") + 1]
        paths = list(takewhile(lambda word: not _is_option(word), words))
        names += [path.partition("=")[0] if "=" in path else "default" for path in paths]
    return names


def _full_name(written: str, known: Collection[str]) -> str:
    """The name that LMDeploy's parser reads (_ for -, abbreviations); unknown words unchanged."""
    if not written.startswith("--"):
        return written
    name, dot, key = written.partition(".")
    name = f"--{name[2:].replace('_', '-')}{dot}{key}"
    if name in known or name in engine_options():
        return name
    meant = [option for option in engine_options() if option.startswith(name)]
    return meant[0] if len(meant) == 1 and synonym(written) is None else written


def _take(rest: list[str], wanted: int | str, name: str) -> list[str]:
    values: list[str] = []
    most = wanted if isinstance(wanted, int) else len(rest)
    while rest and len(values) < most and not _is_option(rest[0]):
        values.append(rest.pop(0))
    if (isinstance(wanted, int) and len(values) < wanted) or (wanted == "+" and not values):
        raise UsageError(f"{name} needs a value", hint=f"write {name} VALUE")
    return values


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit()


def _sort(
    passed: PassedOptions,
    name: str,
    option: EngineOption | None,
    values: list[str],
    unplanned: bool,
) -> None:
    if option is None or option.is_ in ("refused", "undecided"):
        if not unplanned or (option is not None and option.always):
            raise _refused(name, option, values)
        passed.unplanned.append(name)
    elif name == "--model-name":
        passed.model_name = values[0]
        return
    elif option.is_ == "planned" and not option.chosen:
        passed.modelled += [name, *values]
        return
    else:
        _refuse_what_is_set(name, option)
    if option is not None and option.clients:
        passed.public.append(name)
    if name == "--api-keys":
        passed.api_keys += values
    passed.argv += [name, *values]


def _refuse_what_is_set(name: str, option: EngineOption) -> None:
    """Refuse an option that the plan sets, or an option of turbofit with another name."""
    if option.chosen or (option.as_ and not option.clients):
        who = "the plan" if option.chosen else "turbofit"
        raise UsageError(f"{name} after -- is set by {who}", hint=f"give {name} before --")


def _refused(name: str, option: EngineOption | None, values: list[str]) -> UsageError:
    typed = " ".join([name, *values[:1]])
    if option is not None:
        return UsageError(f"{typed}: {option.why}", hint=option.way)
    hint = "leave it out, or take the risk with --unplanned"
    if meaning := synonym(name):
        hint = meaning.here(next(iter(values), None), "--{option} {value} before --")
    return UsageError(f"{name} after -- is no option of LMDeploy {REFERENCE}", hint=hint)
