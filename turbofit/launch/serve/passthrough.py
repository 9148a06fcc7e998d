"""What may follow ``--``: LMDeploy's options, sorted by what they do to the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.synonyms import synonym
from turbofit.core.version import REFERENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.json_types import Options


@dataclass
class PassedOptions:
    """Options after ``--``: what to plan with, what to hand on, and the keys among the latter."""

    modelled: list[str] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)
    api_keys: list[str] = field(default_factory=list)
    unplanned: list[str] = field(default_factory=list)
    model_name: str | None = None


def option_classes() -> dict[str, Options]:
    """The options that LMDeploy knows: class and number of values of each."""
    options = load_yaml(preset_path("engines", "lmdeploy-options"))["options"]
    assert isinstance(options, dict)
    return options


def sort_options(arguments: Sequence[str], *, unplanned: bool = False) -> PassedOptions:
    """Sort LMDeploy's options; ``unplanned``: what the ledger does not model may pass.

    Raises:
        UsageError: an option that turbofit sets, that it cannot model, or that is none.
    """
    classes, passed, rest = option_classes(), PassedOptions(), list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            raise UsageError(f"{word!r} after -- is not an option", hint="name the model before --")
        written, equals, value = word.partition("=")
        name = _full_name(written, classes)
        wanted = classes[name]["values"] if name in classes else "*"
        values = [value] if equals else _take(rest, wanted, written)
        _sort(passed, name, classes.get(name, {"class": "unknown"})["class"], values, unplanned)
    return passed


def adapter_names(argv: Sequence[str]) -> list[str]:
    """What clients call the adapters among LMDeploy's options: NAME=PATH, or a path alone."""
    words = list(argv)
    names: list[str] = []
    while "--adapters" in words:
        del words[: words.index("--adapters") + 1]
        paths = list(takewhile(lambda word: not _is_option(word), words))
        names += [path.partition("=")[0] if "=" in path else "default" for path in paths]
    return names


def _full_name(written: str, classes: dict[str, Any]) -> str:
    """An option by its abbreviation, which LMDeploy's parser takes, too."""
    if written in classes or not written.startswith("--"):
        return written
    meant = [name for name in classes if name.startswith(written)]
    if len(meant) > 1:
        raise UsageError(
            f"{written} after -- could be {', '.join(sorted(meant))}", hint="write it out"
        )
    return meant[0] if meant else written


def _take(rest: list[str], wanted: int | str, name: str) -> list[str]:
    values: list[str] = []
    most = wanted if isinstance(wanted, int) else len(rest)
    while rest and len(values) < most and not _is_option(rest[0]):
        values.append(rest.pop(0))
    if (isinstance(wanted, int) and len(values) < wanted) or (wanted == "+" and not values):
        raise UsageError(f"{name} after -- needs a value", hint=f"write {name} VALUE")
    return values


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit()


def _sort(passed: PassedOptions, name: str, kind: str, values: list[str], unplanned: bool) -> None:
    if kind == "planned":
        raise UsageError(f"{name} after -- is set by the plan", hint=f"give {name} before --")
    if kind == "launcher":
        raise UsageError(
            f"{name} after -- is set by turbofit", hint="leave it out; see turbofit serve --help"
        )
    if kind == "modelled":
        passed.modelled += [name, *values]
        return
    if kind != "free":
        if not unplanned:
            why = "changes memory in ways that the ledger does not model"
            hint = "leave it out, or take the risk with --unplanned"
            if kind == "unknown":
                why = f"is no option of LMDeploy {REFERENCE}"
                if meaning := synonym(name):
                    hint = meaning.here(next(iter(values), None), "--{option} {value} before --")
            raise UsageError(f"{name} after -- {why}", hint=hint)
        passed.unplanned.append(name)
    if name == "--model-name":
        passed.model_name = values[0]
        return
    if name == "--api-keys":
        passed.api_keys.extend(values)
    passed.argv += [name, *values]
