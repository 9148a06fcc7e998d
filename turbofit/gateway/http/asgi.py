"""The types of ASGI's messages, and a detail of asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["Message", "Receive", "Send", "uncancel"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def uncancel(task: asyncio.Task[Any] | None) -> None:
    """Take back a cancellation that was ours; Python 3.11 began to count them."""
    if task is not None and hasattr(task, "uncancel"):
        task.uncancel()
