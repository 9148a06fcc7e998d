"""Versions of Transformers that LMDeploy itself allows, and with which its front ends fail.

They are rows of `presets/engines/known-bad.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from turbofit.core.presets import converted, load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory.versions import parse


class BadTransformers(Struct, forbid_unknown_fields=True):
    """Families that fail with some versions, both ends included; no end: all versions there.

    ``what`` is the effect, ``error`` LMDeploy's message, ``install`` the requirements of pip that
    help, the newest first.
    """

    architectures: tuple[str, ...]
    engines: tuple[str, ...]
    what: str
    error: str
    sources: tuple[str, ...]
    first: str | None = None
    last: str | None = None
    install: tuple[str, ...] = ()

    def has(self, transformers: str) -> bool:
        """Whether a version is between the ends; one that cannot be read is not."""
        wanted = parse(transformers)
        if wanted is None:
            return False
        first, last = parse(self.first or "0.0"), parse(self.last or transformers)
        return first is not None and last is not None and first <= wanted <= last


class _Table(Struct, forbid_unknown_fields=True):
    newest: str
    rows: tuple[BadTransformers, ...]


@cache
def _table() -> _Table:
    path = preset_path("engines", "known-bad")
    return converted(load_yaml(path)["transformers"], _Table, path)


def newest_tried() -> str:
    """The newest version of Transformers that LMDeploy's front ends were run with."""
    return _table().newest


def bad_transformers(
    architecture: str, engines: Iterable[str], transformers: str | None = None
) -> dict[str, BadTransformers]:
    """The row of each engine that fails with a version, or with any if that is None."""
    return {
        engine: row
        for engine in engines
        for row in _table().rows
        if engine in row.engines
        and architecture in row.architectures
        and (transformers is None or row.has(transformers))
    }


def all_bad_transformers() -> tuple[BadTransformers, ...]:
    """Every row of the table."""
    return _table().rows
