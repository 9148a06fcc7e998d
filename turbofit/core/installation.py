"""Finds how turbofit was installed, and makes pip commands for another installation.

The commands name the clone that turbofit was installed from; without a clone, the commands name the
package of the package index.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from turbofit.core.errors import PackageError

_NAME: Final = "turbofit"
#: The folder that has the package turbofit: a clone, or site-packages.
_CODE: Final = Path(__file__).resolve().parents[2]
#: The library that resizes images; pixels.c, its source, and its digest are in the same folder.
_LIBRARY: Final = _CODE / "turbofit" / "serving" / "images" / "libpixels.so"
#: Measured sizes of the environment of `scripts/without-gpu --pytorch` (docs/installation.md).
_PYTORCH_SIZES: Final = "1.0 GB to download, 3.2 GB on disk, no GPU and no driver"


def install_command(extra: str, *, upgrade: bool = False) -> str:
    """Return a pip command, ready to paste, that installs turbofit with an extra of pyproject.toml.

    ``upgrade``: the command also replaces installed versions.
    """
    clone, again = clone_folder(), ["-U"] if upgrade else []
    editable = ["-e"] if clone == _CODE else []
    return shlex.join(["pip", "install", *again, *editable, f"{clone or _NAME}[{extra}]"])


def image_library() -> Path:
    """Return the path of the library that resizes images, compiled when turbofit was installed.

    Raises:
        PackageError: the library is missing or damaged. The hint says how to get the library; the
            hint is empty on systems other than Linux on x86-64.
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
    except OSError as exc:
        why = f"{_LIBRARY} cannot be read: {exc.strerror}"
    clone = clone_folder()
    source = [str(clone)] if clone else ["--no-binary", _NAME, _NAME]
    again = shlex.join(["pip", "install", "--force-reinstall", "--no-deps", *source])
    raise PackageError(why, hint=f"apt install gcc libc6-dev, or another C compiler; then {again}")


def clone_folder() -> Path | None:
    """Return the clone that turbofit was installed from, or runs in; None if there is no clone.

    pip writes the origin of an installation into ``direct_url.json`` (PEP 610).
    """
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.request import url2pathname

    places = []
    with suppress(PackageNotFoundError, msgspec.MsgspecError):
        text = distribution(_NAME).read_text("direct_url.json") or "{}"
        origin = urlsplit(msgspec.json.decode(text, type=dict[str, Any]).get("url", ""))
        places += [Path(url2pathname(origin.path))] if origin.scheme == "file" else []
    for folder in (*places, _CODE):
        if (folder / "README.md").is_file() and (folder / "pyproject.toml").is_file():
            return folder
    return None


def without_gpu(*, pytorch: bool = False) -> str:
    """Return words that recommend ``scripts/without-gpu``, to add to a hint.

    Empty if turbofit was not installed from a clone. ``pytorch``: the environment is to run the
    PyTorch engine and Transformers as well.
    """
    clone = clone_folder()
    if clone is None:
        return ""
    if pytorch:
        return f"{clone}/scripts/without-gpu --pytorch makes an environment: {_PYTORCH_SIZES}"
    return f"; for pretend GPUs alone {clone}/scripts/without-gpu makes one without CUDA"


def installed(*names: str) -> str | None:
    """Return the version of the first installed package of ``names``; None without a package."""
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None
