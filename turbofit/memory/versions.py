"""LMDeploy's versions: which account each version has, and which architectures it lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.model import Model
from turbofit.core.presets import load_yaml, preset_path, presets_dir, read_preset
from turbofit.core.struct import Struct
from turbofit.core.version import REFERENCE

T = TypeVar("T")
Version = tuple[int, int, int]

#: The first version with a file of figures, ``presets/engines/ENGINE-X.Y.yaml``. Older versions are
#: entries of ``generations.yaml``: differences from this version. This version stays the base when
#: a newer version becomes the reference.
FIRST_CURRENT: Final = "0.18"

#: The oldest release that `serve` starts.
OLDEST_SERVED: Final = (0, 16)

_NUMBERS: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


@cache
def written(version: str) -> tuple[int, ...]:
    """Return the two or three numbers in a version's text; empty if it is not a version."""
    match = _NUMBERS.search(version)
    return () if match is None else tuple(int(number) for number in match.groups() if number)


def parse(version: str) -> Version | None:
    """Return the three numbers of a version such as ``0.6`` or ``v0.5.2.post1``, or None."""
    numbers = written(version)
    return (numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else 0) if numbers else None


def between(version: str, first: str | None, last: str | None) -> bool:
    """Return whether a version is in a range; a short bound such as ``0.7`` has all its releases.

    None is no bound. A text that is no version is in no range.
    """
    numbers, low, high = parse(version), written(first or ""), written(last or "")
    return (
        numbers is not None
        and numbers[: len(low)] >= low
        and (last is None or numbers[: len(high)] <= high)
    )


def check_release(version: str) -> None:
    """Refuse a word, such as ``latest``, that is no number of a release.

    Raises:
        UsageError: the word is no number of a release.
    """
    if parse(version) is None:
        raise UsageError(
            f"{version[:40]!r} is no release of LMDeploy",
            hint=f"write it as `--lmdeploy 0.6.4`; {REFERENCE} is the newest that turbofit knows",
        )


def release(version: str) -> tuple[int, int]:
    """Return a version's first two numbers, which identify an account; (0, 0) if it has none."""
    return (parse(version) or (0, 0, 0))[:2]


def is_legacy(version: str) -> bool:
    """Return whether a version is described by an entry of ``generations.yaml``."""
    return () < written(version) < written(FIRST_CURRENT)


def account_version(engine: str, version: str | None = None) -> str | None:
    """Return the version of the account: the version itself, or the nearest older version.

    Args:
        engine: ``turbomind`` or ``pytorch``.
        version: LMDeploy's version; None is the reference.

    Returns:
        The version as in the files' names; None if ``version`` is older than all accounts, or no
        version at all.
    """
    return _nearest((*_figures(engine), *_formulas(engine)), version or REFERENCE)


def figures(engine: str, version: str, type_: type[T]) -> T:
    """Return the figures for an engine's version, or the figures of the nearest older version.

    Raises:
        PackageError: turbofit has no figures for this generation.
    """
    known = _nearest(_figures(engine), version)
    if known is None:
        raise PackageError(
            f"turbofit has no memory account for the {engine} engine of LMDeploy {version}",
            hint=f"use LMDeploy {REFERENCE}",
        )
    read = {
        key: entry["value"] if isinstance(entry, dict) else entry
        for key, entry in load_yaml(preset_path("engines", f"{engine}-{known}")).items()
    }
    return msgspec.convert(read | {"version": version}, type_, strict=False)


def formulas(engine: str, version: str) -> str | None:
    """Return the module with the formulas of a version, or of the nearest older version.

    None: no module; the engine's base class has the formulas.
    """
    known = _nearest(_formulas(engine), version)
    return known and f"v{known.replace('.', '_')}"


def _nearest(names: Iterable[str], version: str) -> str | None:
    older = [name for name in names if release(name) <= release(version)]
    return max(older, key=release, default=None)


def doubt(engine: str, version: str | None) -> str | None:
    """Return a warning if a version has only the account of an older version; else None."""
    preset = account_version(engine, version)
    if preset is None or release(preset) == release(version or REFERENCE):
        return None
    return (
        f"LMDeploy {version} is newer than {preset}: the memory account is that of {preset}, and"
        " margins are doubled"
    )


@cache
def _figures(engine: str) -> tuple[str, ...]:
    """Return the versions with their own figures."""
    paths = (presets_dir() / "engines").glob(f"{engine}-*.yaml")
    return tuple(path.stem.removeprefix(f"{engine}-") for path in paths)


@cache
def _formulas(engine: str) -> tuple[str, ...]:
    """Return the versions with their own formulas, ``memory/ENGINE/vX_Y.py``."""
    paths = (Path(__file__).parent / engine).glob("v[0-9]*_*.py")
    return tuple(path.stem[1:].replace("_", ".") for path in paths)


class _Changes(Struct, forbid_unknown_fields=True):
    """The architectures that a release added to an engine's list, and those that it removed."""

    came: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


class _Architectures(Struct, forbid_unknown_fields=True):
    """How each engine's list of supported architectures changed, by release, oldest first."""

    source: str
    turbomind: dict[str, _Changes]
    pytorch: dict[str, _Changes]


class _Span(NamedTuple):
    """A span of releases that list an architecture: ``came`` is the first of them.

    ``left`` is the first later release without the architecture; None: there is none.
    """

    came: str
    left: str | None


def not_listed(model: Model, engine: str, version: str) -> str | None:
    """Return the reason why a version of an engine does not know a model, or None.

    A short version such as ``0.7`` means every 0.7 release.

    The language model's architecture must be listed, too, unless no release ever lists that
    architecture: classes of vision models often build language models of their own.
    """
    wanted = written(version)
    if not wanted:
        return None
    # A short version stands for all releases between the lowest and the highest third number.
    short = len(wanted) == 2
    oldest, newest = ((*wanted, 0), (*wanted, 1_000_000)) if short else (wanted, wanted)
    for architecture in dict.fromkeys((model.architecture, model.text.architecture)):
        spans = listings(engine).get(architecture, ())
        if not spans and architecture != model.architecture:
            continue
        if not any(
            written(span.came) <= newest and (span.left is None or oldest < written(span.left))
            for span in spans
        ):
            reason = f"the {engine} engine of LMDeploy {version} does not run {architecture}"
            came = [span.came for span in spans if written(span.came) > wanted]
            return f"{reason}, which {came[0]} runs" if came else reason
    return None


def listed_since(
    architecture: str, *, after: str = "", engines: tuple[str, ...] = ("turbomind", "pytorch")
) -> str | None:
    """Return the first release since which one of the engines has always listed an architecture.

    Only releases after the version ``after`` count; None if there is no such release.
    """
    since = [
        span.came
        for engine in engines
        for span in listings(engine).get(architecture, ())
        if span.left is None and written(span.came) > written(after)
    ]
    return min(since, key=written, default=None)


@cache
def listings(engine: str) -> dict[str, tuple[_Span, ...]]:
    """Return the spans of releases that list each architecture, oldest first."""
    read = read_preset("engines", "architectures", _Architectures)
    changes = {"turbomind": read.turbomind, "pytorch": read.pytorch}[engine]
    oldest = next(iter(changes), "")
    spans: dict[str, tuple[_Span, ...]] = {}
    for release, change in changes.items():
        for name in change.came:
            # What the oldest list has counts for all releases before it, too.
            first = "0.0.0" if release == oldest else release
            spans[name] = (*spans.get(name, ()), _Span(first, None))
        for name in change.left:
            *before, last = spans[name]
            spans[name] = (*before, last._replace(left=release))
    return spans
