"""Stage a, in a process of its own: steps that each take memory no rehearsal sees.

Prints a JSON line before and after each step, so that NVML's samples can be read between them:
``{"mark", "at", "reserved"}``, the last what torch's own pool has taken. It imports nothing of
turbofit. Steps: the context; the first kernel; cuBLAS, small and large; cuDNN's convolution;
fused attention; what the driver's own pool rounds to, and when it gives back.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
#: Sizes that the pool of cudaMallocAsync is asked for, in MiB.
POOL_SIZES = (1, 3, 33, 129, 1024)


def mark(name: str, **facts: Any) -> None:
    """One line, with time for a few samples on both sides."""
    time.sleep(0.15)
    sys.stdout.write(json.dumps({"mark": name, "at": time.monotonic(), **facts}) + "\n")
    sys.stdout.flush()
    time.sleep(0.15)


class Pool:
    """The driver's default memory pool, which TurboMind takes from."""

    def __init__(self, lib: Any = None) -> None:
        self.lib: Any = lib or ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError with the driver's code."""
        code = getattr(self.lib, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} gave {code}")

    def take(self, size: int) -> ctypes.c_uint64:
        """A pointer of the default stream."""
        pointer = ctypes.c_uint64()
        self.call("cuMemAllocAsync", ctypes.byref(pointer), ctypes.c_size_t(size), None)
        return pointer

    def give(self, pointer: ctypes.c_uint64) -> None:
        """Back to the pool, in the order of the stream."""
        self.call("cuMemFreeAsync", pointer, None)

    def wait(self) -> None:
        """Until the default stream has done what it was asked."""
        self.call("cuStreamSynchronize", None)

    def free(self) -> int:
        """What cudaMemGetInfo says."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


def pool_steps(pool: Pool) -> None:
    """Rounding, and whether what was freed is free before the stream is waited for, or after."""
    for mib in POOL_SIZES:
        pool.wait()
        before = pool.free()
        pointer = pool.take(mib * MIB)
        pool.wait()
        taken = before - pool.free()
        pool.give(pointer)
        at_once = before - pool.free()
        pool.wait()
        mark(
            f"pool_{mib}_mib", asked=mib * MIB, taken=taken, kept_at_once=at_once,
            kept_after_wait=before - pool.free(),
        )  # fmt: skip


def steps(torch: Any) -> list[tuple[str, Callable[[], Any]]]:
    """Each takes something for the first time; results are dropped at once."""
    functional = torch.nn.functional

    def matrix(rows: int, columns: int) -> Any:
        return torch.ones(rows, columns, dtype=torch.float16, device="cuda")

    def attention() -> None:
        one = torch.ones(1, 16, 1024, 64, dtype=torch.float16, device="cuda")
        functional.scaled_dot_product_attention(one, one, one)

    def convolution() -> None:
        image = torch.ones(1, 3, 448, 448, dtype=torch.float16, device="cuda")
        kernel = torch.ones(64, 3, 14, 14, dtype=torch.float16, device="cuda")
        functional.conv2d(image, kernel, stride=14)

    return [
        ("context", torch.cuda.mem_get_info),
        ("first_kernel", lambda: torch.zeros(8, device="cuda")),
        ("cublas_small", lambda: matrix(16, 16) @ matrix(16, 16)),
        ("cublas_large", lambda: matrix(4096, 4096) @ matrix(4096, 4096)),
        ("fused_attention", attention),
        ("convolution", convolution),
    ]


def step(torch: Any, name: str, act: Callable[[], Any]) -> None:
    """One, marked with what torch's pool keeps after it."""
    why = {}
    try:
        act()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as exc:
        why = {"failed": str(exc)[:200]}
    mark(name, reserved=torch.cuda.memory_reserved(), **why)


def main() -> int:
    """Every step; one that fails says so, and the next is tried."""
    import torch

    mark("begin", torch=torch.__version__, cuda=torch.version.cuda)
    for name, act in steps(torch):
        step(torch, name, act)
    try:
        pool_steps(Pool())
    except (OSError, AttributeError, RuntimeError) as exc:
        mark("pool", failed=str(exc)[:200])
    mark("end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
