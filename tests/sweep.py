"""Sweeps, of which the default check runs a part."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any


def sweep(values: Iterable[Any], every: int = 8) -> list[Any]:
    """Parameters of a test: one of so many in the default check, all in `./scripts/check --all`."""
    return list(values)[:: 1 if os.environ.get("CHECK_ALL") else every]


def part(examples: int, every: int = 8) -> int:
    """How many examples a test draws: one of so many, all of them in `./scripts/check --all`."""
    return examples if os.environ.get("CHECK_ALL") else -(-examples // every)
