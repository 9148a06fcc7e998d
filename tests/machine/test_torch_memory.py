"""Torch's out-of-memory text, in figures."""

from __future__ import annotations

from turbofit.core.units import GIB, KIB
from turbofit.machine.torch_memory import torch_memory


def test_memory_text_with_private_pools_and_small_units() -> None:
    memory = torch_memory(
        "CUDA out of memory. Tried to allocate 512.00 KiB. GPU 3 has a total capacity of 79.15 GiB "
        "of which 448.00 KiB is free. Including non-PyTorch memory, this process has 70.00 GiB "
        "memory in use. Process 12 has 9.00 GiB memory in use. Of the allocated memory 60.00 GiB "
        "is allocated by PyTorch, with 1.20 GiB allocated in private pools (e.g., CUDA Graphs), "
        "and 3.00 GiB is reserved by PyTorch but unallocated."
    )
    assert (memory.requested, memory.free, memory.gpu) == (512 * KIB, 448 * KIB, 3)
    assert (memory.process, memory.allocated, memory.cached) == (70 * GIB, 60 * GIB, 3 * GIB)
    assert memory.others == ((12, 9 * GIB),)
    assert torch_memory("CUDA out of memory. Tried to allocate 2 bytes.").requested == 2


def test_its_own_process_is_found_among_those_that_are_listed() -> None:
    """In a container torch does not mark it: it holds what torch allocated, and a context."""
    memory = torch_memory(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24.00 GiB "
        "of which 1.00 GiB is free. Process 7 has 3.00 GiB memory in use. Process 9 has 18.00 GiB "
        "memory in use. Of the allocated memory 17.00 GiB is allocated by PyTorch, and 512.00 MiB "
        "is reserved by PyTorch but unallocated."
    )
    assert (memory.pid, memory.process, memory.others) == (9, 18 * GIB, ((7, 3 * GIB),))
    assert (memory.missing, memory.unexplained) == (GIB, 2 * GIB)
