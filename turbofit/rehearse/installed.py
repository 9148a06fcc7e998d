"""Finds the installed LMDeploy without importing it."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from turbofit.core.errors import PackageError

_HINT = "install it beside turbofit: pip install lmdeploy==0.18.0"


def engine_version() -> str:
    """LMDeploy's version."""
    try:
        return metadata.version("lmdeploy")
    except metadata.PackageNotFoundError as error:
        raise PackageError("LMDeploy is not installed", hint=_HINT) from error


def engine_library() -> Path:
    """TurboMind's shared library in the installed wheel."""
    spec = importlib.util.find_spec("lmdeploy")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(folder, "turbomind").glob("_turbomind.*.so"))
        if found:
            return found[0]
    raise PackageError("LMDeploy's TurboMind library is not installed", hint=_HINT)
