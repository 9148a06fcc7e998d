"""What installs an extra of turbofit, from where this turbofit came.

turbofit is in no package index: pip finds it only where it was installed from.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.metadata import Distribution

_NAME: Final = "turbofit"
#: A requirement of an extra in the metadata; those of several extras stand once for each.
_REQUIREMENT: Final = re.compile(r"""([A-Za-z0-9][\w.-]*)(?:\[([\w,. -]+)\])?([^;]*);(.*)""")
_EXTRA: Final = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


def install_command(extra: str, *, upgrade: bool = False) -> str:
    """A command for pip that brings what an extra needs, as it can be pasted.

    It names the clone, the file or the repository that turbofit came from; where that is gone, or
    nobody tells it, the packages themselves.

    Args:
        extra: of pyproject.toml, e.g. ``lmdeploy``.
        upgrade: replace versions that are there.
    """
    words = _from_origin(extra) or _requirements(extra, upgrade=upgrade) or [extra]
    return shlex.join(["pip", "install", *(["-U"] if upgrade else []), *words])


def _from_origin(extra: str) -> list[str]:
    """The words where turbofit can be installed again; none where it cannot."""
    clone = Path(__file__).resolve().parents[2]
    package = _distribution()
    origin = _direct_url(package)
    if (clone / "pyproject.toml").is_file():
        editable = origin.get("dir_info", {}).get("editable", False)
        return [*(["-e"] if editable else []), f"{clone}[{extra}]"]
    url = str(origin.get("url", ""))
    if urlsplit(url).scheme == "file":
        from urllib.request import url2pathname  # loads what speaks HTTP

        path = Path(url2pathname(urlsplit(url).path))
        there = path.is_file() or (path / "pyproject.toml").is_file()
        return [f"{path}[{extra}]"] if there else []
    if not url:
        return []
    vcs = origin.get("vcs_info", {})
    revision = vcs.get("requested_revision") or vcs.get("commit_id")
    where = f"{vcs['vcs']}+{url}@{revision}" if vcs else url
    return [f"{_NAME}[{extra}] @ {where}"]


def _distribution() -> Distribution | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return distribution(_NAME)
    except PackageNotFoundError:
        return None


def _direct_url(package: Distribution | None) -> dict[str, Any]:
    """Where pip took turbofit from (PEP 610); empty where that is an index, or nobody wrote it."""
    import json  # a plan that finds all in order reads none

    text = None if package is None else package.read_text("direct_url.json")
    try:
        read = json.loads(text or "{}")
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _requirements(extra: str, *, upgrade: bool) -> list[str]:
    """The extra's packages that are not installed; all where all are, or newer ones are wanted."""
    from importlib.metadata import PackageNotFoundError, version

    def is_there(name: str) -> bool:
        try:
            version(name)
        except PackageNotFoundError:
            return False
        return True

    wanted = dict(_of_extra(extra, set()))
    lacking = [text for name, text in wanted.items() if upgrade or not is_there(name)]
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
        name, inner, bounds = parts[1], parts[2], parts[3].strip()
        if name == _NAME:
            for part in (inner or "").split(","):
                yield from _of_extra(part.strip(), gone)
        else:
            yield name, f"{name}[{inner}]{bounds}" if inner else f"{name}{bounds}"
