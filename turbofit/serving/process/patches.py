"""Replaces functions of a package after its import, if their sources are known."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from turbofit.core.process.imports import After


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
