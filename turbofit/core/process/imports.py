"""Runs a function after the import of a module.

This file imports nothing of turbofit, since it is also loaded alone.
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
        """Return None for any module but the awaited one, so that other finders are asked.

        For the awaited module, return the spec that other finders give, changed so that the
        function is called after the module is loaded.
        """
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            self._act(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
