"""Which release of LMDeploy first ran a model: `presets/engines/first-versions.yaml`."""

from __future__ import annotations

import re
from functools import cache

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct

__all__ = ["not_yet"]


class _FirstVersions(Struct, forbid_unknown_fields=True):
    """By engine and release, the architectures that are new in it."""

    source: str
    turbomind: dict[str, tuple[str, ...]]
    pytorch: dict[str, tuple[str, ...]]


def not_yet(model: Model, engine: str, version: str) -> str | None:
    """Why a version of an engine cannot know a model; None where it may.

    A version that is written in part, such as ``0.7``, is every release that begins so. An
    architecture whose first release is not known is never refused.

    Args:
        model: both its own architecture and its language model's are looked at.
        engine: ``turbomind`` or ``pytorch``.
        version: LMDeploy's.
    """
    wanted = _numbers(version)
    for architecture in dict.fromkeys((model.architecture, model.text.architecture)):
        first = _first_versions(engine).get(architecture)
        if wanted and first and wanted < _numbers(first)[: len(wanted)]:
            return (
                f"the {engine} engine of LMDeploy {version} does not run {architecture}, which"
                f" came with {first}"
            )
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that are written; none where it is no version."""
    found = re.search(r"\d+(\.\d+){1,2}", version)
    return tuple(map(int, found[0].split("."))) if found else ()


@cache
def _first_versions(engine: str) -> dict[str, str]:
    """The first release of each architecture."""
    path = preset_path("engines", "first-versions")
    try:
        read = msgspec.convert(load_yaml(path), _FirstVersions)
    except msgspec.ValidationError as exc:
        raise UsageError(
            f"preset engines/{path.name} is damaged: {exc}", hint="reinstall turbofit"
        ) from None
    found = {"turbomind": read.turbomind, "pytorch": read.pytorch}.get(engine, {})
    return {name: release for release, names in found.items() for name in names}
