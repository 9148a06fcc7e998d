"""Changes a command's words before click reads them: machines, lists, others' options."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, Protocol

import click

from turbofit.cli.usage_errors import all_unknown, as_ours, line_of_others
from turbofit.core.errors import UsageError
from turbofit.core.process.hidden import hide_secrets
from turbofit.core.shell_line import SERVER, ShellLine, read_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Two dashes as editors and web pages write them.
_DASHES: Final = re.compile(r"^-?[\u2010-\u2015\u2212]-?(?=[a-z])")
_GPUS: Final = "CUDA_VISIBLE_DEVICES"


class _Option(Protocol):
    """An option: whether it may have no value, and whether it takes several words."""

    bare: bool
    several: bool


def without_program(words: Sequence[str], ctx: click.Context) -> tuple[list[str], ShellLine | None]:
    """Return the words after ``lmdeploy serve api_server``, and the line that contains them.

    Sets the variables before the words, as a shell would do, except for GPUs (see `take_rest`).

    Raises:
        UsageError: the line is another program's.
    """
    line = read_line(words)
    if line is None:
        return list(words), None
    if line.of != SERVER:
        raise line_of_others(line, ctx)
    os.environ.update({name: value for name, value in line.variables.items() if name != _GPUS})
    return line.words, line


def take_rest(line: ShellLine, ctx: click.Context) -> list[str]:
    """Take a line's GPUs after its options are read; return messages on the words around it."""
    said = _take_gpus(line, ctx)
    if unknown := re.findall(r"\$\{?\w+\}?", " ".join(line.words)):
        said.append(f"{', '.join(unknown)} of the line has no value here: write its value")
    if line.left_out:
        text = f"left out of the line: {', '.join(line.left_out)}"
        said.append(hide_secrets(text, text.split(), os.environ))
    return said


def _take_gpus(line: ShellLine, ctx: click.Context) -> list[str]:
    """Turn a line's CUDA_VISIBLE_DEVICES into ``--gpus`` of a described machine; say so.

    A profile or a variable may also describe the machine. For a measured machine it stays a
    variable, because its numbers are CUDA's. A given ``--gpus`` wins.
    """
    value, on = line.variables.get(_GPUS), ctx.params.get("on") or ""
    if value is None:
        return []
    if "gpus" not in ctx.params or (on, ctx.params["gpus"]) == ("", None):
        os.environ[_GPUS] = value
        return []
    reason = ""
    if ctx.params["gpus"] is not None:
        reason = "--gpus is given"
    elif not re.fullmatch(r"\d+(?:,\d+)*", value):
        reason = "it has no numbers of GPUs"
    elif _is_one_card(on):
        reason = "--on is a single card"
    if reason:
        return [f"{_GPUS}={value} left out: {reason}"]
    ctx.params["gpus"] = value
    return [f"{_GPUS}={value} of the line is taken as --gpus {value}"]


def _is_one_card(on: str) -> bool:
    """Whether ``--on`` is a machine with one card; errors in it are reported when it is read."""
    from turbofit.machine.spec import is_spec, parse_spec

    return is_spec(on) and len(parse_spec(on).gpus) == 1


def one_machine(words: Sequence[str]) -> list[str]:
    """The words, with those after ``--on`` joined if together they are a machine, or cards.

    Raises:
        UsageError: two machines are given.
    """
    left = [_DASHES.sub("--", word) for word in words]
    if "--on" not in left:
        return left
    at = left.index("--on")
    if "--on" in left[at + 1 :]:
        raise UsageError("--on is given twice", hint="one machine of unequal cards is --on A+B")
    behind = left[at + 1 :]
    several = _values(behind)
    if len(several) > 1:
        from turbofit.machine.spec import is_spec

        machines = " ".join(several), "+".join(several)
        several = next(([machine] for machine in machines if is_spec(machine)), several)
    return [*left[: at + 1], *several, *behind]


def for_click(
    words: Sequence[str], options: Mapping[str, _Option], ctx: click.Context
) -> list[str]:
    """``--option a b`` written as ``--option a --option b``; only the last such option counts.

    Raises:
        UsageError: all options that the command does not have, together.
        click.BadOptionUsage: an option stands where another one's value should be.
    """
    left, kept, unknown = list(words), list[str](), list[UsageError]()
    lists: dict[str, list[str]] = {}
    while left:
        word = left.pop(0)
        if _is_option(word) and word.partition("=")[0] not in options:
            try:
                word = as_ours(word, "".join(left[:1]), ctx)
            except UsageError as exc:
                unknown.append(exc)
                continue
        option = options.get(word)
        if option is not None and option.several:
            lists[word] = _values(left)
        else:
            kept += [word] if option is None or option.bare else [word, *_value(word, left)]
    if unknown:
        raise all_unknown(unknown)
    for name, values in lists.items():
        kept += [part for value in values for part in (name, value)] or [name]
    return kept


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and not word[1:2].isdigit()


def _values(left: list[str]) -> list[str]:
    """Take all words up to the next option from the list."""
    end = next((at for at, word in enumerate(left) if _is_option(word)), len(left))
    values, left[:end] = left[:end], []
    return values


def _value(name: str, left: list[str]) -> list[str]:
    """Take an option's value; if it is missing at the end, click reports that."""
    if left and _is_option(left[0]):
        raise click.BadOptionUsage(name, f"{name} needs a value before {left[0]}")
    return [left.pop(0)] if left else []
