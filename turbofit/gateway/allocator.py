"""The C allocator of the gateway's process, told to keep what large bodies need again and again."""

from __future__ import annotations

import ctypes
from typing import Final

from turbofit.core.units import MIB

__all__ = ["keep_large_blocks"]

#: glibc's names for `mallopt`. Source: malloc.h.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
#: Free memory at the end of the heap that is kept, and the largest block that comes from the heap,
#: in bytes; glibc takes no more than 32 MiB for the latter.
_KEPT: Final = 64 * MIB
_LARGEST: Final = 32 * MIB


def keep_large_blocks() -> bool:
    """Let blocks of megabytes come from the heap, and stay there when they are freed.

    glibc gives each of them back to the kernel and faults its pages in again for the next one: that
    was 2 ms of the 3.6 ms that a 2 MB image took to be read, held and written (bench/gateway).
    Threads that start afterwards share one heap: each would else keep as much as the largest body
    that it ever held, 16 MiB more whenever another thread meets one (bench/soak).

    Returns:
        Whether the allocator knows such settings; other ones than glibc's do not.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(
        mallopt(_TRIM_THRESHOLD, _KEPT)
        and mallopt(_MMAP_THRESHOLD, _LARGEST)
        and mallopt(_ARENA_MAX, 1)
    )
