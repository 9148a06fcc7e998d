"""Which options `lmdeploy serve api_server` of an older release has."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from turbofit.core.presets import converted, load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory.versions import parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["came_later", "grouped"]


class _Releases(Struct, forbid_unknown_fields=True):
    """The release that brought an option, or one value of it."""

    options: dict[str, str]
    values: dict[str, str]


def grouped(argv: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The words of a command, each option with its values; what stands before them word by word."""
    group: list[str] = []
    for word in argv:
        if group and (word.startswith("--") or not group[0].startswith("--")):
            yield tuple(group)
            group = []
        group.append(word)
    if group:
        yield tuple(group)


def came_later(option: Sequence[str], version: str) -> str | None:
    """The release that brought an option or its value, where that is newer than a version."""
    known = _releases()
    last = known.values.get(" ".join(option)) or known.options.get(option[0])
    later = last is not None and (parse(last) or ()) > (parse(version) or ())
    return last if later else None


@cache
def _releases() -> _Releases:
    path = preset_path("engines", "option-releases")
    return converted(load_yaml(path), _Releases, path)
