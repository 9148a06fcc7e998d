"""Delays Python's garbage collector until the objects of the start exist."""

from __future__ import annotations

import gc
from typing import Final

USUAL_THRESHOLDS: Final = gc.get_threshold()


def collect_after(objects: int) -> None:
    """Delay the first collection until so many objects exist; later ones come as usual."""
    gc.callbacks.append(_collect_as_usual)
    gc.set_threshold(objects)


def _collect_as_usual(phase: str, _: dict[str, int]) -> None:
    """Restore the usual thresholds after the first collection; only a server runs so long."""
    if phase == "stop":
        gc.callbacks.remove(_collect_as_usual)
        gc.set_threshold(*USUAL_THRESHOLDS)
