"""Python's garbage collector, which begins once what stays until the end is made."""

from __future__ import annotations

import gc
from typing import Final

USUAL_THRESHOLDS: Final = gc.get_threshold()


def collect_after(objects: int) -> None:
    """Let the first collection wait for so many objects; from then on it collects as usual."""
    gc.callbacks.append(_collect_as_usual)
    gc.set_threshold(objects)


def _collect_as_usual(phase: str, _: dict[str, int]) -> None:
    """Collect as usual after the first collection: what still runs then is a server."""
    if phase == "stop":
        gc.callbacks.remove(_collect_as_usual)
        gc.set_threshold(*USUAL_THRESHOLDS)
