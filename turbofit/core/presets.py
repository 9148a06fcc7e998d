"""Finds and reads `presets/`: data with a source for each figure, in the repo and in the wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import yaml

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from turbofit.core.json_types import JsonObject

__all__ = ["converted", "load_yaml", "preset_path", "presets_dir"]

T = TypeVar("T")

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def presets_dir() -> Path:
    """The folder of the presets: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_presets"
    return inside if inside.is_dir() else package.parent / "presets"


def preset_path(room: str, name: str) -> Path:
    """The file of one preset, e.g. ``preset_path("gpus", "rtx3090")``; it need not exist."""
    return presets_dir() / room / f"{name}.yaml"


def load_yaml(path: Path) -> JsonObject:
    """Read one YAML mapping.

    Raises:
        UsageError: the file is missing, is not YAML or is not a mapping.
    """
    try:
        # CSafeLoader is a SafeLoader: it builds plain data only.
        data = yaml.load(path.read_bytes(), Loader=_LOADER)
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as exc:
        raise UsageError(
            f"preset {path.name} cannot be read: {exc}", hint="reinstall turbofit"
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"preset {path.name} is not a mapping", hint="reinstall turbofit")
    return data


def converted(data: object, type_: type[T], path: Path) -> T:
    """What a preset's file holds, or a part of it, as a type.

    Raises:
        UsageError: it is not of that type.
    """
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as exc:
        raise UsageError(
            f"preset {path.parent.name}/{path.name} is damaged: {exc}", hint="reinstall turbofit"
        ) from None
