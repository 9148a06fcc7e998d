"""Torch, Accelerate and Python tracebacks: memory texts of every generation, devices, frames."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.diagnose.lines.events import (
    CONTEXT,
    ModelLoaded,
    PythonFrame,
    TorchMemory,
)

if TYPE_CHECKING:
    from turbofit.core.struct import Struct

__all__ = ["torch_line", "torch_memory"]

_SIZE = r"(\d+(?:\.\d+)? ?(?:bytes|[KMGT]i?B))"
_UNITS: Final = {"bytes": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_REQUESTED: Final = re.compile(rf"Tried to allocate {_SIZE}")
#: Torch up to 2.0: all in one pair of brackets, free after allocated.
_BRACKET: Final = re.compile(
    rf"\(GPU (\d+); {_SIZE} total capacity; {_SIZE} already allocated; {_SIZE} free; "
    rf"{_SIZE} (?:reserved in total by PyTorch|cached)"
)
#: Torch from 2.1, which first wrote "capacty".
_CAPACITY: Final = re.compile(
    rf"GPU (\d+) has a total capaci?ty of {_SIZE} of which {_SIZE} is free"
)
_LIMIT: Final = re.compile(rf"{_SIZE} allowed;")
_THIS: Final = re.compile(rf"this process has {_SIZE} memory in use")
_OTHER: Final = re.compile(rf"Process (\d+) has {_SIZE} memory in use")
_ALLOCATED: Final = re.compile(rf"allocated memory {_SIZE} is allocated by PyTorch")
_CACHED: Final = re.compile(rf"and {_SIZE} is reserved by PyTorch but unallocated")

#: Torch rounds to hundredths of a GiB.
_ROUNDED: Final = (1 << 30) // 100

_FRAME: Final = re.compile(r'^\s*File "([^"]+)", line \d+, in (\S+)')
#: IPython's form, which links the path in a notebook, and rich's.
_NOTEBOOK: Final = re.compile(
    r"^(?:File \[?|│ )((?:[A-Za-z]:)?[^\s:\[\]]+\.py):\d+(?:\]\([^)]*\))?,? in ([\w.<>]+)"
)
_SHARDS: Final = re.compile(r"Loading checkpoint shards:\s+100%.*?(\d+)/(\d+)")


def torch_line(text: str) -> Struct | None:
    """The event of one line, or None; a memory text is only begun here, see `torch_memory`."""
    if "out of memory" in text and ("Tried to allocate" in text or "CUDA out of memory" in text):
        return torch_memory(text)
    if "OutOfMemoryError: Allocation on device" in text:  # with backend:cudaMallocAsync
        return torch_memory(text)
    if ("File" in text and (match := _FRAME.match(text))) or (
        ".py:" in text and (match := _NOTEBOOK.match(text))
    ):
        return PythonFrame(path=match[1], function=match[2])
    if "checkpoint shards" in text and (match := _SHARDS.search(text)):
        return ModelLoaded(shards=int(match[2])) if match[1] == match[2] else None
    return None


def torch_memory(text: str) -> TorchMemory:
    """All figures of an out-of-memory text, which a terminal may have wrapped over lines.

    In the form up to 2.0 the process's use is what torch reserved; its context and libraries are
    not in it.
    """
    requested = _REQUESTED.search(text)
    size = _bytes(requested[1]) if requested else None
    if match := _BRACKET.search(text):
        total, used, free, reserved = (_bytes(match[i]) for i in (2, 3, 4, 5))
        return TorchMemory(
            requested=size,
            gpu=int(match[1]),
            total=total,
            free=free,
            process=reserved,
            allocated=used,
            cached=max(0, reserved - used),
            context=False,
        )
    others = {int(match[1]): _bytes(match[2]) for match in _OTHER.finditer(text)}
    capacity, this = _CAPACITY.search(text), _THIS.search(text)
    allocated_text, cached_text = _ALLOCATED.search(text), _CACHED.search(text)
    allocated = _bytes(allocated_text[1]) if allocated_text else None
    cached = _bytes(cached_text[1]) if cached_text else None
    process = _bytes(this[1]) if this else None
    limit = _LIMIT.search(text)
    whole = _bytes(capacity[2]) if capacity else None
    if process is not None and whole is not None and process > whole:
        process = None  # under WDDM the driver tells no process's memory, and torch prints 2^64
    pid = None if this else _pid_among(others, allocated, cached)
    if pid is not None:
        process = others.pop(pid)
    return TorchMemory(
        requested=size,
        gpu=int(capacity[1]) if capacity else None,
        total=whole,
        free=_bytes(capacity[3]) if capacity else None,
        limit=_bytes(limit[1]) if limit else None,
        # A driver that does not tell what a process holds makes torch print 0.
        process=process or None,
        pid=pid,
        allocated=allocated,
        cached=cached,
        others=tuple(others.items()),
        named=this is not None or pid is not None or not others,
    )


def _pid_among(processes: dict[int, int], allocated: int | None, cached: int | None) -> int | None:
    """The pid under which torch lists this process, where the figures allow one answer.

    Torch lists every process of the card, and calls itself "this process" where the pid is its own:
    not in 2.1, and not in a container, whose pids differ from the driver's. So this process is one
    of them: the only one; the one that holds what torch allocated and a context on top; the only
    one that holds as much, if an engine allocates outside torch.
    """
    least = (allocated or 0) + (cached or 0) - _ROUNDED
    if allocated is None and len(processes) > 1:
        return None
    able = {pid: size for pid, size in processes.items() if size >= least}
    alike = [pid for pid, size in able.items() if size - least <= CONTEXT]
    if alike:
        return min(alike, key=lambda pid: able[pid])
    return next(iter(able)) if len(able) == 1 else None


def _bytes(text: str) -> int:
    unit = text.lstrip("0123456789. ")
    scale = _UNITS["bytes"] if unit == "bytes" else _UNITS[unit[0]]
    return round(float(text.removesuffix(unit)) * scale)
