"""Sorts the words of a command line: turbofit's own words, and LMDeploy's."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Final, NamedTuple, Protocol

import click

from turbofit.cli.pasted_lines import READ, pasted_line
from turbofit.core.errors import UsageError
from turbofit.core.messages import neighbours, same_option
from turbofit.serving.passthrough import (
    EngineOption,
    engine_options,
    full_name,
    is_option,
    sort_options,
    take_values,
)

#: The words that start LMDeploy's server, its page or its chat, or the server of vLLM or SGLang.
_COMMAND: Final = re.compile(
    r"(?:.*/)?lmdeploy serve (?:api_server|gradio)"
    r"|(?:.*[ /])?(?:lmdeploy chat|vllm serve|sglang serve)"
)
_PASTED: Final = re.compile(
    r"api_server|(?:vllm|sglang) serve|lmdeploy (?:chat|serve)|launch_server"
).search
#: These servers as modules that Python runs.
_MODULE: Final = re.compile(
    r"lmdeploy\.serve\.(?:openai\.)?api_server|vllm\.entrypoints\.openai\.api_server"
    r"|sglang\.launch_server"
)
#: How other servers name their model's option.
_MODEL: Final = ("--model", "--model-path", "-m")
#: Options of every server that a plan does not need.
_OF_SERVERS: Final = ("--host", "--port", "--api-key")
_VARIABLE: Final = re.compile(r"((?:CUDA|HF|LMDEPLOY|NCCL|TM)_\w+)=([^$]*)")
_OF_PROGRAM: Final = re.compile(
    r"python[\d.]*|-m|(?:.*/)?(?:lmdeploy|vllm|sglang)(?:\.\S+)?|serve|api_server|gradio|chat"
)
#: Where a shell's own words begin behind a command: a file for its output, or another command.
_OF_SHELL: Final = re.compile(r"\d?>.*|&>.*|[|&;]+")
#: What keyboards and web pages make of the hyphens of an option.
_DASHES: Final = re.compile(
    "^-*[\u2010-\u2015\u2212\uff0d][-\u2010-\u2015\u2212\uff0d]*(?=[A-Za-z])"
)
#: The key, in a context's ``meta``, of the sorted words (`Typed`).
TYPED: Final = "turbofit.typed"


class TypedOption(Protocol):
    """An option of turbofit, as the command line has it.

    ``bare``: the option may stand without a value. ``several``: the option takes several words.
    """

    bare: bool
    several: bool


class Typed(NamedTuple):
    """The words of a command line, sorted by the program that they are for.

    ``words`` are turbofit's own, in click's form. ``passed`` are LMDeploy's options for the engine.
    ``variables`` are the environment variables that the line sets. ``notes`` are sentences on the
    use of LMDeploy's words. ``unknown`` are options that neither turbofit nor LMDeploy has.
    ``in_place``: the line names LMDeploy's server, and turbofit runs in place of that server.
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
        UsageError: an option of LMDeploy lacks its value, or changes memory that no plan counts.
        click.BadOptionUsage: an option stands where the value of another option should be.
    """
    typed = _pasted(words) if plans else Typed(list(words), [], {}, [], [])
    reader, remaining = _Reader(options, typed, serves=serves), list(typed.words)
    while remaining:
        word = _with_hyphens(remaining.pop(0))
        written, equals, value = word.partition("=")
        same = same_option(written) if plans else ""
        attached = [value] if equals else []
        follows = [*attached, *remaining]
        name = same or (_full_name(written, options, follows) if plans else written)
        # Several short options in one word, such as -vq, which click splits.
        are_letters = word[1:2] != "-" and all(f"-{letter}" in options for letter in word[1:])
        if same:
            reader.read_as.append(f"{written} as {same}")
        if name in options:
            reader.take_own(name, attached, remaining)
        elif not is_option(word) or are_letters:
            reader.own.append(word)
        elif not plans or not reader.take_others(name, written, attached, remaining):
            typed.unknown.append(written)
    if not serves and not typed.unknown:
        sort_options(typed.passed)  # raises if no plan counts an option
        typed.passed.clear()
    return typed._replace(words=reader.words(), notes=[*typed.notes, *reader.notes()])


def _full_name(written: str, known: Collection[str], follows: Sequence[str]) -> str:
    """Return an option's full name; a flag is not abbreviated where a value follows it."""
    name = full_name(written, known)
    row = engine_options().get(name)
    is_flag = row is not None and not row.values and len(name) > len(written)
    return written if is_flag and follows and not is_option(follows[0]) else name


def _with_hyphens(word: str) -> str:
    """Return an option that begins with another dash as it is written with hyphens."""
    letters = _DASHES.sub("", word)
    if letters == word:
        return word
    return f"-{letters}" if len(letters.partition("=")[0]) == 1 else f"--{letters}"


class _Reader:
    """Takes the options of a command line one by one, and notes the use of LMDeploy's options.

    ``own`` are turbofit's words so far, and ``_lists`` the values of its options that take several
    words. ``read_as`` has clauses on options of other servers. ``_said`` has the names of
    LMDeploy's options by the clause on their use.
    """

    def __init__(self, options: Mapping[str, TypedOption], typed: Typed, *, serves: bool) -> None:
        self._options, self._typed, self._serves = options, typed, serves
        self.own: list[str] = []
        self.read_as: list[str] = []
        self._lists: dict[str, list[str]] = {}
        self._said: dict[str, list[str]] = {}

    def take_own(self, name: str, attached: list[str], remaining: list[str]) -> None:
        """Take an option of turbofit; its value is ``attached``, or first in ``remaining``."""
        option = self._options[name]
        if option.several:
            self._lists.setdefault(name, []).extend(attached or take_values(remaining, "*", name))
            return
        if name == "--on" and name in self.own:
            raise UsageError(
                "`--on` is given twice", hint="one machine of unequal cards is `--on A+B`"
            )
        self.own.append("=".join([name, *attached]))
        if remaining and not attached and not option.bare:
            if is_option(remaining[0]):
                raise click.BadOptionUsage(name, f"{name} needs a value before {remaining[0]}")
            self.own.append(remaining.pop(0))

    def take_others(
        self, name: str, written: str, attached: list[str], remaining: list[str]
    ) -> bool:
        """Take an option of LMDeploy, or of another server; return whether it is known.

        An option of LMDeploy is for the engine, or becomes turbofit's option, or is left out.
        """
        row = engine_options().get(name)
        if row is not None:
            values = attached or take_values(remaining, row.values, written)
            self._said.setdefault(self._taken(name, row, values), []).append(name)
        elif name in _OF_SERVERS and not self._serves:
            attached or take_values(remaining, 1, written)
            self.read_as.append(f"{name} without effect on the plan")
        elif name in _MODEL:
            self.own += attached or take_values(remaining, 1, written)
        else:
            return False
        return True

    def _taken(self, name: str, row: EngineOption, values: list[str]) -> str:
        """Take one option of LMDeploy, and return a clause on its use for the note.

        The clause is empty for an option that `sort_options` answers: no plan counts its memory.
        """
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
        """Return a sentence on options of other servers, and one on options of LMDeploy."""
        parts = [f"{', '.join(names)} {what}" for what, names in self._said.items() if what]
        pairs = (("read", self.read_as), ("as LMDeploy's", parts))
        return [f"{what}: {'; '.join(clauses)}" for what, clauses in pairs if clauses]


def _pasted(words: Sequence[str]) -> Typed:
    """Cut a pasted command line of LMDeploy's server down to its arguments and variables."""
    for place, word in enumerate(words):
        if other := pasted_line(word):
            notes = [f"left out: {', '.join(other.left_out)}"] if other.left_out else []
            return Typed([*words[:place], *other.words, *words[place + 1 :]], [], {}, notes, [])
        if _PASTED(word) and len(word.split()) > 1:
            try:
                line = shlex.split(os.path.expandvars(re.sub(r"\\\s*\n", " ", word)))
            except ValueError as exc:
                raise UsageError(f"the pasted line: {exc}", hint="paste the whole line") from None
            if end := _end_of_program(line):
                of_server = takewhile(lambda it: not _OF_SHELL.fullmatch(it), line[end:])
                return _cut(line[:end], [*words[:place], *of_server, *words[place + 1 :]])
        if " --" in word and not is_option(word):
            raise UsageError(
                f"{word.partition(' --')[0][:80]!r} is no model: it stands in a line of another"
                " program",
                hint=READ,
            )
    end, first = _end_of_program(words), "".join(words[:1]).partition(" ")[0]
    if not end and (hint := neighbours()["commands"].get(first)):
        raise UsageError(f"{first!r} begins a line of another program", hint=hint)
    if any(word.startswith("-") and word != "-m" for word in words[:end]):
        end = 0  # options of turbofit come first, and api_server is the value of one of them
    return _cut(words[:end], list(words[end:]))


def _end_of_program(words: Sequence[str]) -> int:
    """Return the index of the first word after the name of LMDeploy's server; 0 without a name."""
    for place, word in enumerate(words):
        whole = " ".join(words[max(0, place - 2) : place + 1])
        if _COMMAND.fullmatch(whole) or _MODULE.fullmatch(word) or whole == "api_server":
            return place + 1
    return 0


def _cut(before: Sequence[str], words: list[str]) -> Typed:
    """Return the ``words`` that follow the server's name in a pasted line, as a `Typed`.

    Its variables are from the words ``before``. A note tells of other words there, which are lost.
    """
    found = [match for word in before if (match := _VARIABLE.fullmatch(word))]
    left_out = len(found) < sum(not _OF_PROGRAM.fullmatch(word) for word in before)
    notes = ["left out: other words before lmdeploy serve api_server"] if left_out else []
    last = "".join(before[-1:])
    in_place = last.endswith("api_server") and not last.startswith("vllm")
    return Typed(words, [], {match[1]: match[2] for match in found}, notes, [], in_place)


def split_rest(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before ``--``, and the words after it."""
    before = list(arguments)
    if "--" not in before:
        return before, []
    at = before.index("--")
    return before[:at], before[at + 1 :]
