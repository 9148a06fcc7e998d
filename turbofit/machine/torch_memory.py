"""Reads torch's out-of-memory text: the bytes of a card, and the processes that hold memory.

The module reads the texts of all versions of torch. If a text lists processes, the module finds
among the listed processes the one that wrote the text.
"""

from __future__ import annotations

import re
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct
from turbofit.core.units import GIB, parse_bytes

#: More bytes than the CUDA context and the libraries of one process take.
CONTEXT: Final = 3 << 29
_SIZE = r"(\d+(?:\.\d+)? ?(?:bytes|[KMGT]i?B))"
_REQUESTED: Final = re.compile(rf"Tried to allocate {_SIZE}")
#: Torch up to 2.0: all figures in one pair of brackets, free memory after allocated memory.
_BRACKET: Final = re.compile(
    rf"\(GPU (\d+); {_SIZE} total capacity; {_SIZE} already allocated; {_SIZE} free; "
    rf"{_SIZE} (?:reserved in total by PyTorch|cached)"
)
#: Torch from 2.1 on; torch 2.1 wrote "capacty".
_CAPACITY: Final = re.compile(
    rf"GPU (\d+) has a total capaci?ty of {_SIZE} of which {_SIZE} is free"
)
_THIS: Final = re.compile(rf"this process has {_SIZE} memory in use")
_OTHER_PROCESS: Final = re.compile(rf"Process (\d+) has {_SIZE} memory in use")
_ALLOCATED: Final = re.compile(rf"allocated memory {_SIZE} is allocated by PyTorch")
_CACHED: Final = re.compile(rf"and {_SIZE} is reserved by PyTorch but unallocated")
#: Torch's message within a text, without the exception's name before the message.
_TEXT: Final = re.compile(
    r"(?:CUDA|HIP) out of memory.*|Tried to allocate.*|Allocation on device.*"
)
#: Torch rounds to hundredths of a GiB.
_ROUNDED: Final = GIB // 100


class TorchMemory(Struct):
    """Torch's out-of-memory text; all figures are bytes, rounded as torch prints them.

    ``process`` is the memory that torch's own process holds on the GPU; ``others`` has the memory
    of other processes by pid. ``cached`` is reserved by torch's allocator but not allocated.
    ``pid`` is the pid of torch's own process in the text. ``named`` False: torch's own process may
    be one of the ``others``. ``context`` False: ``process`` does not include the CUDA context.
    """

    message: str = ""
    requested: int | None = None
    gpu: int | None = None
    total: int | None = None
    free: int | None = None
    process: int | None = None
    allocated: int | None = None
    cached: int | None = None
    pid: int | None = None
    others: tuple[tuple[int, int], ...] = ()
    named: bool = True
    context: bool = True

    @property
    def missing(self) -> int | None:
        """The least number of bytes that were missing; None if torch does not say."""
        if self.requested is None or self.free is None or self.free >= self.requested:
            return None
        return self.requested - self.free

    @property
    def beyond(self) -> int:
        """The bytes by which used and free memory together exceed the card's total.

        Above 0 the figures of the text contradict each other.
        """
        parts = (self.process, self.free, *(size for _, size in self.others))
        return 0 if self.total is None else sum(part or 0 for part in parts) - self.total

    @property
    def unexplained(self) -> int:
        """The card's bytes that no process in the text holds.

        If ``process`` does not include the CUDA context of torch's own process, one context is
        subtracted.
        """
        if self.total is None or self.process is None or self.free is None:
            return 0
        return max(0, -self.beyond if self.context else -self.beyond - CONTEXT)

    @property
    def figures(self) -> int:
        values = (self.requested, self.total, self.free, self.process, self.allocated, self.cached)
        return sum(value is not None for value in values) + len(self.others)


def torch_memory(text: str) -> TorchMemory:
    """Read all figures of an out-of-memory text, whose lines a terminal may have wrapped.

    In the form up to torch 2.0, ``process`` is the memory that torch reserved, without the context
    and libraries. An impossible figure, as under Windows, is None.
    """
    text_match = _TEXT.search(text)
    message = text_match[0] if text_match else text
    if bracket := _BRACKET.search(text):
        total, used, free, reserved = (_bytes(bracket[i]) for i in (2, 3, 4, 5))
        return TorchMemory(
            message=message, requested=_figure(_REQUESTED, text), gpu=int(bracket[1]),
            total=total, free=free, process=reserved, allocated=used,
            cached=max(0, (reserved or 0) - (used or 0)), context=False,
        )  # fmt: skip
    # Torch from 2.1 on lists the card's processes.
    sizes = ((int(match[1]), _bytes(match[2])) for match in _OTHER_PROCESS.finditer(text))
    others = {pid: size for pid, size in sizes if size is not None}
    capacity, this = _CAPACITY.search(text), _THIS.search(text)
    allocated, cached = _figure(_ALLOCATED, text), _figure(_CACHED, text)
    gpu, total, free = (
        (int(capacity[1]), _bytes(capacity[2]), _bytes(capacity[3]))
        if capacity
        else (None, None, None)
    )
    process = _figure(_THIS, text)
    pid = None if this else _pid_among(others, allocated, cached)
    if pid is not None:
        process = others.pop(pid)
    return TorchMemory(
        message=message,
        requested=_figure(_REQUESTED, text),
        gpu=gpu,
        total=total,
        free=free,
        # Torch prints 0, or under WDDM 2^64, if the driver does not give the figure.
        process=process if process and (total is None or process <= total) else None,
        pid=pid,
        allocated=allocated,
        cached=cached,
        others=tuple(others.items()),
        named=this is not None or pid is not None or not others,
    )


def _pid_among(processes: dict[int, int], allocated: int | None, cached: int | None) -> int | None:
    """Return the pid of the process that wrote the text; None if the figures do not tell.

    ``processes`` has the bytes of the listed processes by pid. Torch writes "this process" for its
    own process; but torch 2.1 does not, nor does torch in a container, where pids differ from the
    driver's. Without this mark, the text's process is found by size. It holds the bytes that torch
    allocated, plus a CUDA context; or, if an engine allocates outside torch, it is the only process
    that holds so many bytes or more.
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
