"""Python runs this first in every process of a pretend machine; the folder is on its PYTHONPATH.

Once torch is imported, `turbofit_values` computes what programs steer by. It needs nothing of
turbofit.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

#: The files of this folder are no part of a package.
_AFTER: Any = importlib.import_module("turbofit_imports").After
_HERE = str(Path(__file__).resolve().parent)


def _name_compiler(cache: Any) -> None:
    """Names Triton's compiler by its file's size and date; Triton would read all 460 MB of it."""
    folder = Path(cache.__file__).parents[1] / "_C"
    files = [(file.name, file.stat()) for file in sorted(folder.glob("libtriton.*"))]
    key = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    cache.triton_key = lambda: key


def _run_hidden() -> None:
    """The ``sitecustomize`` that would have been found without us."""
    others = [entry for entry in sys.path if os.path.realpath(entry or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if os.environ.get("TURBOFIT_PRETEND_LIBRARIES"):
    compute = _AFTER("torch", lambda _: importlib.import_module("turbofit_values").install())
    sys.meta_path.insert(0, compute)
    sys.meta_path.insert(0, _AFTER("triton.runtime.cache", _name_compiler))
_run_hidden()
