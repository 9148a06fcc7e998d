"""Calls a function after the import of a module.

This file imports nothing of turbofit, because processes on pretend GPUs load the file alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
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
