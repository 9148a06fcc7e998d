"""Finds the installed LMDeploy without importing it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from turbofit.core.errors import PackageError
from turbofit.kernels.installed import turbomind_library

_HINT = "install it beside turbofit: pip install lmdeploy==0.18.0"


def engine_version() -> str:
    """LMDeploy's version."""
    try:
        return metadata.version("lmdeploy")
    except metadata.PackageNotFoundError as error:
        raise PackageError("LMDeploy is not installed", hint=_HINT) from error


def engine_library() -> Path:
    """TurboMind's shared library in the installed wheel.

    Raises:
        PackageError: there is none.
    """
    found = turbomind_library()
    if found is None:
        raise PackageError("LMDeploy's TurboMind library is not installed", hint=_HINT)
    return found
