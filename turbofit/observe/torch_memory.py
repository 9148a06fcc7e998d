"""Torch's out-of-memory text in all its forms, and which of the processes it names is its own."""

from __future__ import annotations

import re
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.units import GIB, parse_bytes
from turbofit.observe.log_events import CONTEXT, TorchMemory

_SIZE = r"(\d+(?:\.\d+)? ?(?:bytes|[KMGT]i?B))"
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
#: The text itself, behind the exception's name.
_TEXT: Final = re.compile(
    r"(?:CUDA|HIP) out of memory.*|Tried to allocate.*|Allocation on device.*"
)
#: Torch rounds to hundredths of a GiB.
_ROUNDED: Final = GIB // 100


def torch_memory(text: str) -> TorchMemory:
    """All figures of an out-of-memory text, which a terminal may have wrapped over lines.

    In the form up to 2.0 the process's use is what torch reserved; its context and libraries are
    not in it. A figure that cannot be, as under Windows, is None.
    """
    text_match = _TEXT.search(text)
    message, requested = text_match[0] if text_match else text, _figure(_REQUESTED, text)
    if match := _BRACKET.search(text):
        total, used, free, reserved = (_bytes(match[i]) for i in (2, 3, 4, 5))
        return TorchMemory(
            message=message, requested=requested, gpu=int(match[1]), total=total, free=free,
            process=reserved, allocated=used, cached=max(0, (reserved or 0) - (used or 0)),
            context=False,
        )  # fmt: skip
    sizes = ((int(match[1]), _bytes(match[2])) for match in _OTHER.finditer(text))
    others = {pid: size for pid, size in sizes if size is not None}
    capacity, this = _CAPACITY.search(text), _THIS.search(text)
    allocated, cached = _figure(_ALLOCATED, text), _figure(_CACHED, text)
    process, whole = _figure(_THIS, text), _bytes(capacity[2]) if capacity else None
    if process is not None and whole is not None and process > whole:
        process = None  # under WDDM the driver tells no process's memory, and torch prints 2^64
    pid = None if this else _pid_among(others, allocated, cached)
    if pid is not None:
        process = others.pop(pid)
    return TorchMemory(
        message=message,
        requested=requested,
        gpu=int(capacity[1]) if capacity else None,
        total=whole,
        free=_bytes(capacity[3]) if capacity else None,
        limit=_figure(_LIMIT, text),
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


def _figure(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return _bytes(match[1]) if match else None


def _bytes(text: str) -> int | None:
    try:
        return parse_bytes(text.replace("bytes", "B"))
    except UsageError:
        return None
