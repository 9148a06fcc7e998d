"""Plans, takes, passes or refuses each option of `lmdeploy serve api_server`.

``presets/engines/lmdeploy-options.yaml`` is the table: an option is planned, replaced by an
option of turbofit, passed to the engine, or refused. Options of turbofit itself need no table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Literal

import msgspec

from turbofit.core.errors import UsageError, option_of
from turbofit.core.messages import of_other_server
from turbofit.core.presets import read_preset
from turbofit.core.struct import Struct
from turbofit.core.version import REFERENCE


class EngineOption(Struct, rename={"is_": "is", "as_": "as"}, forbid_unknown_fields=True):
    """One option in the table of LMDeploy's options; the head of that file explains each field."""

    is_: Literal["planned", "taken", "passed", "refused", "undecided"]
    values: int | str
    as_: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    clients: bool = False
    always: bool = False
    default: str | None = None
    why: str = "it changes memory in ways that no plan counts"
    way: str = "leave it out, or take the risk with turbofit serve --unplanned"
    say: str = ""
    until: str | None = None


class _Table(Struct):
    """The table of LMDeploy's options; the head of the file explains the fields."""

    lacks: dict[str, tuple[str, ...]]
    fields: frozenset[str]
    options: dict[str, EngineOption]


class PassedOptions(msgspec.Struct):
    """LMDeploy's options that turbofit passes to the engines.

    ``argv`` has all options with their values. ``api_keys`` are the API keys among the values.
    ``unplanned`` names options whose memory no plan counts. ``public`` names options for clients,
    which have no effect behind a gateway.
    """

    argv: list[str] = []
    api_keys: list[str] = []
    unplanned: list[str] = []
    public: list[str] = []


@cache
def option_table() -> _Table:
    return read_preset("engines", "lmdeploy-options", _Table)


def engine_options() -> dict[str, EngineOption]:
    return option_table().options


def uncounted_fields() -> frozenset[str]:
    """Return fields of LMDeploy's engine configs that change memory in ways that no plan counts."""
    refused = (name for name, option in engine_options().items() if option.is_ == "refused")
    return option_table().fields | {name.lstrip("-").replace("-", "_") for name in refused}


def sort_options(arguments: Sequence[str], *, unplanned: bool = False) -> PassedOptions:
    """Sort a user's options for LMDeploy after --, and refuse options that cannot be passed.

    ``unplanned``: pass also options whose memory no plan counts.

    Raises:
        UsageError: turbofit sets an option, no plan counts its memory, or LMDeploy lacks it.
    """
    passed, refused = _sorted_options(arguments, unplanned=unplanned)
    if refused:
        raise together(refused)
    return passed


def refused_options(arguments: Sequence[str]) -> list[UsageError]:
    """Return an error for each of a user's options for LMDeploy that cannot be passed."""
    return _sorted_options(arguments, unplanned=False)[1]


def together(errors: Sequence[UsageError]) -> UsageError:
    """Return one error for all that is wrong in a line, so that one start shows all of it."""
    if len(errors) == 1:
        return errors[0]
    hints = dict.fromkeys(error.hint for error in errors)
    return UsageError("; ".join(error.message for error in errors), hint="; ".join(hints))


def _sorted_options(
    arguments: Sequence[str], *, unplanned: bool
) -> tuple[PassedOptions, list[UsageError]]:
    """Return the options that are passed, and an error for each option that cannot be.

    Raises:
        UsageError: a word is no option, or an option lacks its value.
    """
    options, passed, rest = engine_options(), PassedOptions(), list(arguments)
    refused: list[UsageError] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            raise UsageError(f"{word!r} after -- is not an option", hint="name the model before --")
        written, equals, value = word.partition("=")
        name = full_name(written, ())
        option = options.get(name)
        values = [value] if equals else take_values(rest, option.values if option else "*", written)
        if option is None or option.is_ in ("refused", "undecided"):
            always_refused = option is not None and option.always
            if always_refused or not unplanned:
                refused.append(_refused(name, option, values))
                continue
            passed.unplanned.append(name)
        elif option.is_ == "planned" or (option.as_ and not option.clients):
            by_turbofit = f"{name} after -- is set by turbofit"
            refused.append(UsageError(by_turbofit, hint=f"give {name} before --"))
            continue
        if option is not None and option.clients:
            passed.public.append(name)
        passed.api_keys += values if name == "--api-keys" else []
        passed.argv += [name, *values]
    return passed, refused


def full_name(written: str, known: Collection[str]) -> str:
    """Return an option's full name; LMDeploy's parser takes underscores and abbreviations.

    ``known`` has further full names. An unknown word, or an abbreviation that is also an option of
    vLLM, is returned unchanged.
    """
    if not written.startswith("--"):
        return written
    name, dot, key = written.partition(".")
    name = f"--{name[2:].replace('_', '-')}{dot}{key}"
    if name in known or name in engine_options():
        return name
    meant = [option for option in engine_options() if option.startswith(name)]
    return meant[0] if len(meant) == 1 and not of_other_server(written, str) else written


def take_values(rest: list[str], wanted: int | str, name: str) -> list[str]:
    """Remove an option's values from the beginning of ``rest``, and return the values.

    ``wanted`` is the number of values; ``+`` (at least one) and ``*`` (any number) mean all
    words up to the next option. ``name`` is the option's name.

    Raises:
        UsageError: the option has too few values.
    """
    values: list[str] = []
    most = wanted if isinstance(wanted, int) else len(rest)
    while rest and len(values) < most and not is_option(rest[0]):
        values.append(rest.pop(0))
    if wanted != "*" and len(values) < (wanted if isinstance(wanted, int) else 1):
        raise UsageError(f"{name} needs a value", hint=f"write {name} VALUE")
    return values


def is_option(word: str) -> bool:
    """Return whether a word is an option; values, negative numbers and ``-`` are not."""
    return len(word) > 1 and word.startswith("-") and not word[1].isdigit()


def _refused(name: str, option: EngineOption | None, values: list[str]) -> UsageError:
    """Return the error for an option that cannot be passed, with the reason and a hint."""
    typed = " ".join([name, *values[:1]])
    if option is not None:
        return UsageError(f"{typed}: {option.why}", hint=option.way)
    hint = of_other_server(name, lambda field: f"{option_of(field)} before --")
    hint = hint or "leave it out, or take the risk with --unplanned"
    return UsageError(f"{name} after -- is no option of LMDeploy {REFERENCE}", hint=hint)
