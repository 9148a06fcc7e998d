"""Python runs this first in every process of a pretend machine; the folder is on its PYTHONPATH.

It waits for torch to be imported and then lets `turbofit_values` compute the values that programs
steer by. Another ``sitecustomize``, hidden by this one, is run too. It needs nothing of turbofit.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).resolve().parent)


class _AfterTorch:
    """A finder that lets others find torch and acts when it has been loaded."""

    def find_spec(self, name: str, *_: Any) -> Any:
        """The real spec of torch, whose loader tells us when it is done."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            importlib.import_module("turbofit_values").install()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _run_hidden() -> None:
    """The ``sitecustomize`` that would have been found without us."""
    others = [entry for entry in sys.path if os.path.realpath(entry or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if os.environ.get("TURBOFIT_PRETEND_LIBRARIES"):
    sys.meta_path.insert(0, _AfterTorch())
_run_hidden()
