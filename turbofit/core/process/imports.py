"""Calls a function after the import of a module, and says whether its code is known.

This file imports nothing of turbofit, because processes on pretend GPUs load the file alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


class After:
    """An import finder that calls ``act`` with the module ``name`` after its import."""

    def __init__(self, name: str, act: Callable[[Any], object]) -> None:
        self._name, self._act = name, act

    def find_spec(self, name: str, *_: Any) -> Any:
        """Return None for other modules, so that Python asks other finders.

        For the awaited module, return the spec of the other finders; its loader calls the function
        after it has loaded the module.
        """
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # the next line asks only the other finders
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            self._act(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def once_imported(name: str, act: Callable[[Any], object]) -> None:
    """Call ``act`` with the module ``name``: at once if already imported, else after the import."""
    if name in sys.modules:  # as in an engine that was a standby
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, After(name, act))


def unlike(function: Any, known: Mapping[str, str]) -> str | None:
    """Return why a function of a package may not be replaced; None if its source is known.

    ``known`` has the first digits of the SHA-256 of each source, by qualified name.
    """
    import hashlib
    import inspect

    digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    if digest.startswith(known.get(function.__qualname__, "?")):
        return None
    return f"its {function.__qualname__} is not as known"
