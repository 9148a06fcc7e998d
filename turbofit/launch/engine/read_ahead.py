"""Reads a checkpoint's weights into the page cache while the engine that loads them imports."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import known

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.machine import Host
    from turbofit.core.plan import Plan

_LOG = LazyLogger(__name__)


def begin(plan: Plan, host: Host) -> Thread | None:
    """Begin to read, within what the host has beside what the engines need; None: nothing is read.

    The kernel drops these pages before it lacks memory, and reads nothing that it has already.
    """
    room = known(host.ram_available, 0) - plan.host.pinned - plan.host.pageable
    files = weight_files(plan.model.source.checkpoint or "", room)
    if not files or not hasattr(os, "posix_fadvise"):
        return None
    # In a thread: the kernel's call waits where the disk's queue is full.
    thread = Thread(target=_read, args=(files,), name="read-ahead", daemon=True)
    thread.start()
    return thread


def weight_files(folder: str, room: int) -> list[Path]:
    """The files with weights of a folder, in the order of their names, as far as the room goes."""
    files: list[Path] = []
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        with suppress(OSError):
            room -= path.stat().st_size
            if room < 0:
                break
            files.append(path)
    return files


def _read(files: Iterable[Path]) -> None:
    for path in files:
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            _LOG.debug("%s is read ahead", path.name)
