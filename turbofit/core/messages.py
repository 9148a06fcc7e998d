"""Words for messages: sets of GPUs, plurals, conflicting options, similar names."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Final

from turbofit.core.errors import UsageError, option_of
from turbofit.core.presets import load_yaml, presets_dir

#: The hint for a command about a server, when no server runs.
HOW_TO_SERVE: Final = "turbofit serve MODEL; without a GPU add --pretend --on SPEC"
#: A warning about the engines' own commands, for a plan whose peak pays for queued image requests.
QUEUED: Final = (
    "this plan is valid only if image requests are queued: turbofit serve and turbofit.pipeline"
    " queue them"
)
#: The beginning of another warning about these commands.
BEYOND: Final = "requests beyond these limits are not planned for"
#: Reports show these two warnings at the command of each engine, and not among other warnings.
BESIDE_COMMANDS: Final = (QUEUED, BEYOND)
#: The first line of a server on pretend GPUs. It is a warning because --quiet shows warnings.
PRETEND: Final = (
    "warning: PRETEND GPUs: memory, admission, errors and death are real; the words of answers mean"
    " nothing"
)
#: The header of answers from pretend GPUs.
PRETEND_HEADER: Final = "x-turbofit-pretend"
#: The words that explain this header.
PRETEND_WORDS: Final = "PRETEND GPUs: the words of its answers mean nothing"
PRETEND_SPEED: Final = "PRETEND GPUs: no speed here is real"
#: The header that names a request at its engine, and the engine's page of the names whose first
#: token is there (`serving.engine.first_tokens`, `gateway.first_tokens`).
EXCHANGE: Final = "x-turbofit-exchange"
FIRST_TOKENS: Final = "/turbofit/first_tokens"
#: The beginning of a note on the PyTorch engine's speed; the row of an unknown speed says it, too.
SLOW_IMAGES: Final = "how fast the PyTorch engine answers images is unknown"
OWN_CODE: Final = "LMDeploy runs the checkpoint's own code: --trust-remote-code is set"
RESERVED: Final = (
    "torch keeps memory that it has reserved: nvidia-smi may show more than the peak, under"
    " turbofit by half the margin at most, else up to the whole card"
)
#: Notes that need no action; only the full text of a plan shows these notes.
HARMLESS: Final = (OWN_CODE, RESERVED)
#: The least similarity of two names that counts as a misspelling.
_ALIKE: Final = 0.8
#: Quotes that people copy together with a word.
_QUOTES: Final = "\"'`\u2018\u2019\u201c\u201d\u201e\u300c\u300d"


def indices(gpus: Iterable[int]) -> str:
    """Return GPU indices as a text, with runs shortened: ``0-3`` or ``0,2-4``."""
    runs: list[list[int]] = []
    for gpu in sorted(set(gpus)):
        if runs and gpu == runs[-1][1] + 1:
            runs[-1][1] = gpu
        else:
            runs.append([gpu, gpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def groups_of(groups: Iterable[tuple[int, ...]]) -> str:
    """Return groups of GPU indices as a text: ``0-1 | 2-3``."""
    return " | ".join(indices(group) for group in groups)


def refuse_together(options: Mapping[str, object], beside: str, hint: str = "") -> None:
    """Refuse options that conflict with the option ``beside``.

    ``options`` has each option's value by its name. ``hint`` is added to the advice to leave the
    option out.

    Raises:
        UsageError: one of the ``options`` has a value.
    """
    for name, value in options.items():
        if value or value == "":
            option = f"`{option_of(name)}`"
            raise UsageError(
                f"{option} and {beside} do not go together",
                hint=f"leave {option} out{hint}",
            )


def plural(count: int, noun: str) -> str:
    """Return the form of a noun after a number: ``patch`` after 1, ``patches`` after 2."""
    if count == 1:
        return noun
    return f"{noun}es" if noun.endswith(("ch", "sh", "s", "x")) else f"{noun}s"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 request``, ``1,024 requests``."""
    return f"{count:,} {plural(count, noun)}"


def plain(text: str) -> str:
    """Return a text without surrounding quotes and with full-width characters made ASCII."""
    return unicodedata.normalize("NFKC", text.strip().strip(_QUOTES)).strip()


def of_other_server(name: str, spelled: Callable[[str], str]) -> str:
    """Return words for turbofit's equivalent of an option of vLLM, SGLang, llama.cpp or Ollama.

    The words are empty for other options. ``spelled`` turns the name of a setting into the name of
    turbofit's option.
    """
    program, row = _of_other_server(name)
    return f"an option of {program}; here: {_equivalent(row, spelled)}" if row else ""


def same_option(name: str) -> str:
    """Return turbofit's option that takes an option of another server as it is; empty if none.

    These are the rows of presets/neighbours.yaml that have nothing else to say.
    """
    row = _of_other_server(name)[1]
    return option_of(row["here"]) if row.keys() == {"here"} else ""


def _of_other_server(name: str) -> tuple[str, dict[str, str]]:
    """Return the server that has an option, and the option's row; both are empty if none has."""
    word = name.lstrip("-").replace("_", "-").lower()
    found = (pair for pair in neighbours()["programs"].items() if word in pair[1])
    program, rows = next(found, ("", {word: {}}))
    return program, rows[word]


def _equivalent(row: Mapping[str, str], spelled: Callable[[str], str]) -> str:
    return ", ".join(spelled(text) if key == "here" else text for key, text in row.items())


@cache
def neighbours() -> dict[str, Any]:
    """Return presets/neighbours.yaml: words of other programs, with turbofit's own words.

    The tables are of commands, options, arguments, SPECs, and options of other servers. A row of
    commands or options with several names stands under each of them.
    """
    table: dict[str, Any] = load_yaml(presets_dir() / "neighbours.yaml")
    table["commands"] = _by_each_name(table["commands"])
    for tables in (table["options"], table["programs"]):
        for program, rows in tables.items():
            tables[program] = _by_each_name(rows)
    return table


def _by_each_name(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return rows, of which some have several names, by each of their names."""
    return {name: row for names, row in rows.items() for name in names.split()}


def neighbour(
    name: str, known: Iterable[str], spelled: Callable[[str], str], command: str = ""
) -> str:
    """Return a hint for an option that turbofit does not have, but other programs have; else empty.

    The hint names turbofit's own option, if ``known`` has its setting, or says what to do.
    ``spelled`` turns a setting's name into the option's name. Hints for ``command`` alone win over
    hints for every command.
    """
    rows, word = neighbours()["options"], name.lstrip("-").replace("_", "-").lower()
    row = rows.get(command, {}).get(word) or rows["every"].get(word)
    if row is None or ("here" in row and row["here"] not in known):
        return ""
    return f"here: {_equivalent(row, spelled)}" if "here" in row else str(row["say"])


def near(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return up to ``count`` known names that a misspelt name may mean, the nearest first.

    If no name is similar, names with the same letters in another order are returned. If there are
    none, known beginnings of ``name`` are: ``kv-cache`` for ``kv-cache-type``.
    """
    from difflib import get_close_matches

    known = list(known)
    alike = get_close_matches(name, known, n=count, cutoff=_ALIKE)
    letters = [word for word in known if sorted(word) == sorted(name)]
    return alike or (letters or [word for word in known if name.startswith(f"{word}-")])[:count]


def guess(name: str, known: Iterable[str], count: int = 1) -> str:
    """Return ``did you mean NAME?`` with the nearest known names; empty without a near name."""
    alike = near(name, known, count)
    return f"did you mean {' or '.join(alike)}?" if alike else ""


def meant(word: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown word: the nearest known words, or all known words."""
    known = list(dict.fromkeys(known))
    return guess(word, known, 3) or f"known: {', '.join(known)}"
