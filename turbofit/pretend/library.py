"""The account's own calls, from inside a process that runs on a pretend machine."""

from __future__ import annotations

import ctypes
from pathlib import Path

from turbofit.pretend.libraries import ACCOUNT, PretendError

_ABI = 5
NO_MEMORY = 2


class LibraryAccount:
    """The account of this process: marks, pools of our own, and holding the engine still."""

    def __init__(self, folder: Path) -> None:
        self._lib = ctypes.CDLL(str(folder / ACCOUNT))
        if self._lib.pretend_abi() != _ABI:
            raise PretendError(
                "the pretend libraries are of another turbofit",
                hint="unset TURBOFIT_PRETEND_LIBRARIES",
            )
        self._lib.pretend_calls.restype = ctypes.c_uint64
        self._lib.pretend_pool_create.restype = ctypes.c_void_p

    def mark(self, phase: str) -> None:
        """Begins a phase in the timeline."""
        self._lib.pretend_mark(" ".join(phase.split()).encode())

    def calls(self) -> int:
        """How many CUDA calls were made so far, by any thread."""
        return int(self._lib.pretend_calls())

    def physical(self, device: int) -> int:
        """The machine's index of a card that this process sees; -1 where there is none."""
        return int(self._lib.pretend_physical(device))

    def freeze(self) -> bool:
        """Holds all other threads that call CUDA where they are; False if one did not stop in time.

        They have five seconds.
        """
        return int(self._lib.pretend_freeze(5000)) >= 0

    def thaw(self) -> bool:
        """Lets them go on; False if one of them had gone on by itself (after five seconds)."""
        return bool(self._lib.pretend_thaw())

    def pool(self, device: int, step: int) -> ctypes.c_void_p:
        """A pool of our own on a card, which keeps what it has until it is trimmed.

        It grows by ``step`` bytes.
        """
        handle = self._lib.pretend_pool_create(device)
        if not handle:
            raise ValueError(f"no pretend device {device}")
        pool = ctypes.c_void_p(handle)
        self._lib.pretend_pool_threshold(pool, ctypes.c_uint64(2**64 - 1))
        self._lib.pretend_pool_step(pool, ctypes.c_size_t(step))
        return pool

    def allocate(self, pool: ctypes.c_void_p, size: int) -> int | None:
        """The address of ``size`` bytes from the pool, 0 for none, None if the card is full."""
        pointer, length = ctypes.c_void_p(), ctypes.c_size_t(size)
        if self._lib.pretend_pool_malloc(pool, length, ctypes.byref(pointer)) == NO_MEMORY:
            return None
        return pointer.value or 0

    def free(self, address: int) -> None:
        """Gives an address back."""
        self._lib.pretend_free(ctypes.c_void_p(address))

    def trim(self, pool: ctypes.c_void_p) -> None:
        """Gives back to the card what the pool holds and does not use."""
        self._lib.pretend_pool_trim(pool, ctypes.c_size_t(0))
