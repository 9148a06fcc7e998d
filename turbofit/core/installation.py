"""How turbofit was installed, and how pip installs it again or with an extra.

pip is given what it was installed from: a clone, a wheel, a repository, an index.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from turbofit.core.errors import PackageError

if TYPE_CHECKING:
    from importlib.metadata import Distribution

_NAME: Final = "turbofit"
#: The folder with the code: in a clone, or in an environment.
_CODE: Final = Path(__file__).resolve().parents[2]
_ORIGIN: Final = "direct_url.json"
#: The library that resizes images, the source that hatch_build.py compiled, and its digest.
_LIBRARY: Final = _CODE / "turbofit" / "serving" / "images" / "libpixels.so"


class _Commit(msgspec.Struct):
    vcs: str
    commit_id: str


class _Folder(msgspec.Struct):
    editable: bool = False


class _Origin(msgspec.Struct):
    """Where a package is from; ``dir_info`` is set for a folder, ``vcs_info`` for a repository."""

    url: str
    dir_info: _Folder | None = None
    vcs_info: _Commit | None = None


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
    read = _origin()
    split = urlsplit(read.url if read is not None else "")
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


def _origin() -> _Origin | None:
    """The origin of turbofit as pip noted it in ``direct_url.json`` (PEP 610)."""
    package = _distribution()
    try:
        return msgspec.json.decode((package and package.read_text(_ORIGIN)) or "", type=_Origin)
    except msgspec.MsgspecError:
        return None


def _source(extra: str) -> list[str]:
    """The words by which pip installs turbofit with an extra; empty if its origin is gone."""
    read = _origin()
    if read is None:
        return []
    extra = extra and f"[{extra}]"
    if read.vcs_info is not None:
        return [f"{_NAME}{extra} @ {read.vcs_info.vcs}+{read.url}@{read.vcs_info.commit_id}"]
    split = urlsplit(read.url)
    if split.scheme != "file":
        return [f"{_NAME}{extra} @ {read.url}"]
    path = _local_path(split.path)
    there = (path / "pyproject.toml").is_file() if read.dir_info is not None else path.is_file()
    editable = ["-e"] if read.dir_info is not None and read.dir_info.editable else []
    return [*editable, f"{path}{extra}"] if there else []


def _distribution() -> Distribution | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return distribution(_NAME)
    except PackageNotFoundError:
        return None


def installed(*names: str) -> str | None:
    """The version of the first of these packages that is installed, None if none is."""
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None
