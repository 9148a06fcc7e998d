"""Finds and reads `presets/`: YAML files of data; each number there has a source."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import yaml

from turbofit.core.errors import UsageError
from turbofit.core.struct import JsonObject

T = TypeVar("T")

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def presets_dir() -> Path:
    """Return the folder of the presets, which is inside the package only in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_presets"
    return inside if inside.is_dir() else package.parent / "presets"


def preset_path(folder: str, name: str) -> Path:
    """Return the path of a preset, such as ``preset_path("gpus", "rtx3090")``.

    ``folder`` is a folder of the presets, or empty.
    """
    return presets_dir() / folder / f"{name}.yaml"


def is_preset(folder: str, name: str) -> bool:
    """Return whether ``folder``, a folder of the presets, has a preset of this name."""
    return preset_path(folder, name).is_file()


def presets_of(folder: str) -> frozenset[str]:
    """Return the names of all presets of ``folder``, a folder of the presets."""
    return frozenset(path.stem for path in (presets_dir() / folder).glob("*.yaml"))


def load_yaml(path: Path) -> JsonObject:
    """Read the YAML mapping of a preset or another file.

    Raises:
        UsageError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        # CSafeLoader, like SafeLoader, builds plain data only.
        data = yaml.load(path.read_bytes(), Loader=_LOADER)
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as exc:
        raise UsageError(
            f"preset {path.name} cannot be read: {exc}", hint="reinstall turbofit"
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"preset {path.name} is not a mapping", hint="reinstall turbofit")
    return data


def converted(data: object, type_: type[T], path: Path) -> T:
    """Convert ``data``, the whole or a part of a preset's content, to a type.

    Raises:
        UsageError: the content is not of that type.
    """
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as exc:
        raise UsageError(
            f"preset {path.parent.name}/{path.name} is damaged: {exc}", hint="reinstall turbofit"
        ) from None


def read_preset(folder: str, name: str, type_: type[T], part: str | None = None) -> T:
    """Read a preset, or the value of its key ``part``, into a type.

    Raises:
        UsageError: the file cannot be read, or its content is not of that type.
    """
    path = preset_path(folder, name)
    data = load_yaml(path)
    return converted(data if part is None else data.get(part), type_, path)


def merged(below: JsonObject, above: JsonObject) -> JsonObject:
    """Merge two mappings, level by level; lists and single values come from ``above``."""
    mapping = dict(below)
    for key, value in above.items():
        old = mapping.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        mapping[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return mapping
