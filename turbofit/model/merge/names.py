"""One name for a tensor, whatever release of Transformers, peft or LLaVA wrote it.

Transformers 4.52 moved a vision-language model's parts under ``model.``: checkpoints keep
``language_model.model.layers``, modules (and so adapters) are ``model.language_model.layers``.
Transformers 5 dropped ``vision_model`` from CLIP's tower. The original LLaVA has neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["TensorNames", "bare"]

_PREFIXES: Final = ("base_model.model.", "base_model.")
_LEADING: Final = ("model", "language_model")
_PROJECTOR: Final = {"0": "linear_1", "2": "linear_2"}


class TensorNames:
    """The tensor names of a checkpoint, found by any of their spellings."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._by_bare: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._by_bare.setdefault(bare(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The checkpoint's own spelling; None where it has no such tensor, or two that could be."""
        for prefix in (*_PREFIXES, ""):
            if name.startswith(prefix) and name[len(prefix) :] in self._names:
                return name[len(prefix) :]
        found = self._by_bare.get(bare(name), [])
        return found[0] if len(found) == 1 else None


def bare(name: str) -> str:
    """A name without the prefixes in which releases differ.

    ``model.language_model.layers.0.x`` and ``language_model.model.layers.0.x`` give ``layers.0.x``.
    """
    parts = name.split(".")
    while parts[0] == "base_model" and len(parts) > 1:
        parts.pop(0)
    while parts[0] in _LEADING and len(parts) > 1:
        parts.pop(0)
    if parts[0] == "vision_tower":
        while parts[0] in ("vision_tower", "vision_model") and len(parts) > 1:
            parts.pop(0)
        parts.insert(0, "vision_tower")
    if parts[0] == "mm_projector" and len(parts) > 1 and parts[1] in _PROJECTOR:
        parts[:2] = ["multi_modal_projector", _PROJECTOR[parts[1]]]
    return ".".join(parts)
