"""Lists all cases: command lines in groups, with the lines to run before them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.golden import spaces

_SPACES = (
    spaces.models, spaces.cards, spaces.checkpoints, spaces.generations, spaces.options,
)  # fmt: skip


class Case(NamedTuple):
    """One document: the output of ``turbofit LINE``, after ``before`` and with ``env`` set."""

    group: str
    line: str
    env: tuple[tuple[str, str], ...] = ()
    before: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The line as a person would type it after ``turbofit``, with what comes before it."""
        here = [*(f"{key}={value}" for key, value in self.env), self.line or "(nothing)"]
        return " && ".join((*self.before, " ".join(here)))


def all_cases(only: Iterable[str] = ()) -> list[Case]:
    """Return all cases, or the cases of some groups; each command line once."""
    wanted = set(only)
    return [case for case in _every() if not wanted or case.group in wanted]


def groups() -> list[str]:
    """The names of all groups."""
    return list(dict.fromkeys(case.group for case in all_cases()))


@cache
def _every() -> tuple[Case, ...]:
    return tuple({case.name: case for case in (*_chosen(), *_systematic())}.values())


def _systematic() -> Iterator[Case]:
    """Yield the cases of `spaces`, each in the group of its command."""
    for space in _SPACES:
        for line in space():
            words = line.split()
            yield Case(words[0], " ".join(words))


def _chosen() -> Iterator[Case]:
    """Yield the cases of commands.yaml."""
    text = Path(__file__).with_name("commands.yaml").read_text(encoding="utf-8")
    found: dict[str, list[Any]] = yaml.safe_load(text)
    twice = found.pop("twice")
    for group, entries in found.items():
        for entry in entries:
            case = _case(group, entry if isinstance(entry, Mapping) else {"run": entry})
            yield case
            if group in twice:
                yield case._replace(line=_as_json(case.line))


def _case(group: str, entry: Mapping[str, Any]) -> Case:
    env = tuple(entry.get("env", {}).items())
    return Case(group, entry["run"], env, tuple(entry.get("before", ())))


def _as_json(line: str) -> str:
    """Return a line with ``--json``, in front of arguments behind ``--``."""
    words = shlex.split(line)
    at = words.index("--") if "--" in words else len(words)
    return shlex.join([*words[:at], "--json", *words[at:]])
