"""Which release of LMDeploy first ran a model: `presets/engines/first-versions.yaml`."""

from __future__ import annotations

from functools import cache

from turbofit.core.model import Model
from turbofit.core.presets import converted, load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory.versions import written

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
    wanted = written(version)
    for architecture in dict.fromkeys((model.architecture, model.text.architecture)):
        first = _first_versions(engine).get(architecture)
        if wanted and first and wanted < written(first)[: len(wanted)]:
            return (
                f"the {engine} engine of LMDeploy {version} does not run {architecture}, which"
                f" came with {first}"
            )
    return None


@cache
def _first_versions(engine: str) -> dict[str, str]:
    """The first release of each architecture."""
    path = preset_path("engines", "first-versions")
    read = converted(load_yaml(path), _FirstVersions, path)
    found = {"turbomind": read.turbomind, "pytorch": read.pytorch}.get(engine, {})
    return {name: release for release, names in found.items() for name in names}
