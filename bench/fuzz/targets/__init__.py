"""The targets, a module each.

A module has ``one(data)``, which returns or raises nothing; what its docstring does not promise
escapes and is a finding. ``seeds()`` are inputs to begin with, ``WORDS`` what an input is made of.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

__all__ = ["TARGETS", "load"]

TARGETS: Final = (
    "bodies", "connections", "images", "videos", "logs", "diagnose", "specs", "documents",
    "device_code", "checkpoints",
)  # fmt: skip


def load(name: str) -> Any:
    """The module of a target."""
    return import_module(f"bench.fuzz.targets.{name}")
