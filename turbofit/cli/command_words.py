"""A command's words before click reads them: a machine of several words, lists, others' options."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

import click

from turbofit.cli.usage_errors import all_unknown, as_ours
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Two dashes, as editors and web pages make them.
_DASHES: Final = re.compile(r"^-?[\u2010-\u2015\u2212]-?(?=[a-z])")


class _Option(Protocol):
    """An option: whether it may stand without a value, and whether it takes several words."""

    bare: bool
    several: bool


def one_machine(words: Sequence[str]) -> list[str]:
    """The words with what stands behind ``--on`` as one, where that is a machine, or cards.

    Raises:
        UsageError: two machines are named.
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
    """``--option a b`` as ``--option a --option b``; of such an option the last one counts.

    Raises:
        UsageError: options that the command does not have, all at once.
        click.BadOptionUsage: an option stands where another one's value should.
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
    """Take all words up to the next option."""
    end = next((at for at, word in enumerate(left) if _is_option(word)), len(left))
    values, left[:end] = left[:end], []
    return values


def _value(name: str, left: list[str]) -> list[str]:
    """Take an option's value; of one that stands last click says that it is missing."""
    if left and _is_option(left[0]):
        raise click.BadOptionUsage(name, f"{name} needs a value before {left[0]}")
    return [left.pop(0)] if left else []
