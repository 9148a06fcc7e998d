"""What installs an extra of turbofit: its packages, as turbofit itself is in no package index."""

from __future__ import annotations

import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.metadata import Distribution

_NAME: Final = "turbofit"
#: A requirement of an extra in the metadata; those of several extras stand once for each.
_REQUIREMENT: Final = re.compile(r"""([A-Za-z0-9][\w.-]*)(?:\[([\w,. -]+)\])?([^;]*);(.*)""")
_EXTRA: Final = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


def install_command(extra: str, *, upgrade: bool = False) -> str:
    """A command for pip that brings what an extra needs, as it can be pasted.

    It names the clone that the code lies in where turbofit was never installed.

    Args:
        extra: of pyproject.toml, e.g. ``lmdeploy``.
        upgrade: replace versions that are there.
    """
    clone = Path(__file__).resolve().parents[2]
    words = _requirements(extra, upgrade=upgrade) or [f"{clone}[{extra}]"]
    return shlex.join(["pip", "install", *(["-U"] if upgrade else []), *words])


def _distribution() -> Distribution | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return distribution(_NAME)
    except PackageNotFoundError:
        return None


def _requirements(extra: str, *, upgrade: bool) -> list[str]:
    """The extra's packages that are not installed; all where all are, or newer ones are wanted."""
    wanted = dict(_of_extra(extra, set()))
    lacking = [text for name, text in wanted.items() if upgrade or installed(name) is None]
    return lacking or list(wanted.values())


def _of_extra(extra: str, gone: set[str]) -> Iterator[tuple[str, str]]:
    """Name and requirement of each package of an extra, those of extras that it names too."""
    package = _distribution()
    if extra in gone or package is None:
        return
    gone.add(extra)
    for text in package.requires or ():
        parts = _REQUIREMENT.fullmatch(text)
        if parts is None or extra not in _EXTRA.findall(parts[4]):
            continue
        if sys.platform == "win32" and 'sys_platform != "win32"' in parts[4]:
            continue
        name, inner, bounds = parts[1], parts[2], parts[3].strip()
        if name == _NAME:
            for part in (inner or "").split(","):
                yield from _of_extra(part.strip(), gone)
        else:
            yield name, f"{name}[{inner}]{bounds}" if inner else f"{name}{bounds}"


def installed(*names: str) -> str | None:
    """The version of the first of these packages that is beside us, None where none is."""
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None
