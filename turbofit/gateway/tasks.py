"""A detail of asyncio that several files need."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["uncancel"]


def uncancel(task: asyncio.Task[Any] | None) -> None:
    """Take back a cancellation that was ours; Python 3.11 began to count them."""
    if task is not None and hasattr(task, "uncancel"):
        task.uncancel()
