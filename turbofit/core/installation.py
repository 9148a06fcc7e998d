"""How turbofit was installed, and how pip installs it again or with an extra.

pip is given what it was installed from: a clone, a wheel, a repository, an index.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from turbofit.core.errors import PackageError

if TYPE_CHECKING:
    from turbofit.core.json_types import JsonObject

_NAME: Final = "turbofit"
#: The folder with the code: in a clone, or in an environment.
_CODE: Final = Path(__file__).resolve().parents[2]
_ORIGIN: Final = "direct_url.json"
#: The library that resizes images, the source that hatch_build.py compiled, and its digest.
_LIBRARY: Final = _CODE / "turbofit" / "serving" / "images" / "libpixels.so"


def install_command(extra: str, *, upgrade: bool = False) -> str:
    """A pip command, ready to paste, that installs the packages of an extra of pyproject.toml.

    It names the clone, the wheel or the repository from which pip installed turbofit, as pip noted
    it; else the clone that contains the code, or an index's turbofit if that is where it came from.
    ``upgrade`` replaces installed versions.
    """
    again = ["-U"] if upgrade else []
    here = _CODE if (_CODE / "pyproject.toml").is_file() else _NAME
    return shlex.join(["pip", "install", *again, *(_source(extra) or [f"{here}[{extra}]"])])


def image_library() -> Path:
    """The library that resizes images, compiled when turbofit was installed.

    Raises:
        PackageError: it is missing or damaged; the hint is how to get it, empty where nobody can.
    """
    import sysconfig
    from hashlib import sha256

    if sysconfig.get_platform() != "linux-x86_64":
        raise PackageError("this is no Linux on x86-64", hint="")
    try:
        made = sha256(_LIBRARY.with_name("pixels.c").read_bytes() + _LIBRARY.read_bytes())
        if _LIBRARY.with_name(f"{_LIBRARY.name}.sha256").read_bytes() == made.hexdigest().encode():
            return _LIBRARY
        why = f"{_LIBRARY} is not what was installed"
    except FileNotFoundError:
        why = "turbofit was installed without a C compiler"
    except OSError as exc:
        why = f"{_LIBRARY} cannot be read: {exc.strerror}"
    clone = clone_folder()
    source = _source("") or ([str(clone)] if clone else ["--no-binary", _NAME, _NAME])
    again = shlex.join(["pip", "install", "--force-reinstall", "--no-deps", *source])
    raise PackageError(why, hint=f"apt install gcc libc6-dev, or another C compiler; then {again}")


def clone_folder() -> Path | None:
    """The clone that turbofit was installed from, or that contains its code; None if neither is."""
    split = urlsplit(_origin().get("url", ""))
    installed_from = [_local_path(split.path)] if split.scheme == "file" else []
    for folder in (*installed_from, _CODE):
        if (folder / "README.md").is_file() and (folder / "pyproject.toml").is_file():
            return folder
    return None


def without_gpu() -> str:
    """The end of a hint that names ``scripts/without-gpu``; empty if no clone has it."""
    clone = clone_folder()
    script = None if clone is None else clone / "scripts" / "without-gpu"
    if script is None or not script.is_file():
        return ""
    return f"; for pretend GPUs alone {script} makes an environment without CUDA"


def _local_path(path: str) -> Path:
    from urllib.request import url2pathname  # heavy, and only this hint needs it

    return Path(url2pathname(path))


def _origin() -> JsonObject:
    """The origin of turbofit as pip noted it in ``direct_url.json`` (PEP 610); empty if unknown."""
    from importlib.metadata import PackageNotFoundError, distribution

    with suppress(PackageNotFoundError, msgspec.MsgspecError):
        text = distribution(_NAME).read_text(_ORIGIN) or ""
        return msgspec.json.decode(text, type=dict[str, Any])
    return {}


def _source(extra: str) -> list[str]:
    """The words by which pip installs turbofit with an extra; empty if its origin is gone."""
    origin, extra = _origin(), extra and f"[{extra}]"
    url, vcs, folder = origin.get("url", ""), origin.get("vcs_info"), origin.get("dir_info")
    if vcs is not None:
        return [f"{_NAME}{extra} @ {vcs['vcs']}+{url}@{vcs['commit_id']}"]
    split = urlsplit(url)
    if split.scheme != "file":
        return [f"{_NAME}{extra} @ {url}"] if url else []
    path = _local_path(split.path)
    there = path.is_file() if folder is None else (path / "pyproject.toml").is_file()
    editable = ["-e"] if folder is not None and folder.get("editable") else []
    return [*editable, f"{path}{extra}"] if there else []


def installed(*names: str) -> str | None:
    """The version of the first of these packages that is installed, None if none is."""
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None
