"""Python runs this file first in every process of a pretend machine.

The folder of this file is on the ``PYTHONPATH`` of these processes. When a process imports torch,
this file loads `turbofit_values`, which computes the values that control a program. This file
imports nothing of the package turbofit, which may not be installed.
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


def _load_imports() -> Any:
    """Load turbofit's module `core.process.imports` by its path."""
    path = Path(_HERE).parents[2] / "core" / "process" / "imports.py"
    spec: Any = importlib.util.spec_from_file_location("turbofit_imports", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_AFTER: Any = _load_imports().After


def _name_compiler(cache: Any) -> None:
    """Let Triton identify its compiler by size and date, and not read the compiler's 460 MB."""
    folder = Path(cache.__file__).parents[1] / "_C"
    files = [(file.name, file.stat()) for file in sorted(folder.glob("libtriton.*"))]
    key = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    cache.triton_key = lambda: key


def _run_hidden() -> None:
    """Run the ``sitecustomize`` of the user, which this file hides from Python."""
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
