"""What CUDA takes as TurboMind uses it, in processes that hold nothing else: one PART each.

``python -m bench.gpu.runtime PART`` prints marks like `bench.gpu.constants`, through the runtime
and cuBLAS that TurboMind is linked to, not torch's.

- ``plain``: a context, and the first small allocation; ``torch``, ``turbomind``: the same after
  their libraries were loaded. With CUDA_MODULE_LOADING=EAGER all their kernels are loaded at once.
- ``handles``: after so many cuBLAS handles were made, then after one product on each.
- ``pool``: what the default pool and one of TurboMind's kind (nothing is given back by itself)
  round to, whether freed memory is free at once or after the stream was waited for, and by which
  steps a pool grows.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import sysconfig
from pathlib import Path
from typing import Any

from bench.gpu.constants import MIB, POOL_SIZES, mark

__all__ = ["HANDLES", "PARTS", "Cuda", "handles", "pool"]

#: So many cuBLAS handles are there at each mark; TurboMind's first GPU has 15, each other 5.
HANDLES = (1, 2, 5, 10, 15)
#: Pieces of 1 MiB by which a pool is grown.
_PIECES = 80
#: Of cudaMemPoolAttr: bytes that a pool keeps when its stream is waited for.
_RELEASE_THRESHOLD = 4
#: Rows and columns of a product, in half precision (CUDA_R_16F, CUBLAS_COMPUTE_32F).
_SIDE, _HALF, _FLOAT = 512, 2, 68


class PoolProperties(ctypes.Structure):
    """cudaMemPoolProps: of pinned memory (1) on a device (1), the rest 0."""

    _fields_ = (
        ("allocation", ctypes.c_int), ("handle", ctypes.c_int), ("location", ctypes.c_int),
        ("device", ctypes.c_int), ("rest", ctypes.c_ubyte * 72),
    )  # fmt: skip


class Cuda:
    """The CUDA runtime; a call that fails raises RuntimeError."""

    def __init__(self, lib: Any = None) -> None:
        self.lib: Any = lib or library("cudart")

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self.lib, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} gave {code}")

    def take(self, size: int) -> ctypes.c_void_p:
        """Plain memory."""
        pointer = ctypes.c_void_p()
        self("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def free(self) -> int:
        """Bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value


def library(name: str) -> Any:
    """CUDA 12's, as TurboMind's wheel wants it, else 13's; by name, or where wheels put it."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia"
    for major in (12, 13):
        file = f"lib{name}.so.{major}"
        for path in (file, *map(str, folder.glob(f"**/{file}"))):
            found = _loads(path)
            if found is not None:
                return found
    raise OSError(f"neither lib{name}.so.12 nor .13 can be loaded")


def _loads(path: str) -> Any:
    try:
        return ctypes.CDLL(path)
    except OSError:
        return None


def context(cuda: Cuda) -> None:
    """The first calls of a process."""
    cuda("cudaFree", None)
    mark("context")
    cuda.take(512)
    mark("first")


def handles(cuda: Cuda, blas: Any) -> None:
    """Of cuBLAS, as many as TurboMind has; each is used once."""
    a, b, c = (cuda.take(2 * _SIDE * _SIDE) for _ in range(3))
    one, before = ctypes.c_float(1.0), cuda.free()
    mark("base", handles=0, took=0)
    made: list[ctypes.c_void_p] = []
    for count in HANDLES:
        while len(made) < count:
            handle = ctypes.c_void_p()
            if code := blas.cublasCreate_v2(ctypes.byref(handle)):
                raise RuntimeError(f"cublasCreate_v2 gave {code}")
            made.append(handle)
        mark(f"made_{count}", handles=count, took=before - cuda.free())
    for count, handle in enumerate(made, 1):
        code = blas.cublasGemmEx(
            handle, 0, 0, _SIDE, _SIDE, _SIDE, ctypes.byref(one), a, _HALF, _SIDE, b, _HALF, _SIDE,
            ctypes.byref(one), c, _HALF, _SIDE, _FLOAT, -1,
        )  # fmt: skip
        if code:
            raise RuntimeError(f"cublasGemmEx gave {code}")
        cuda("cudaDeviceSynchronize")
        if count in HANDLES:
            mark(f"used_{count}", handles=count, took=before - cuda.free())
    for handle in made:
        blas.cublasDestroy_v2(handle)
    mark("destroyed", handles=0, took=before - cuda.free())


def pool(cuda: Cuda) -> None:
    """The default pool, then one that keeps what it has."""
    keeping, stream = ctypes.c_void_p(), ctypes.c_void_p()
    cuda("cudaStreamCreateWithFlags", ctypes.byref(stream), 1)
    default = ctypes.c_void_p()
    cuda("cudaDeviceGetDefaultMemPool", ctypes.byref(default), 0)
    _pieces(cuda, default, stream, "default")
    made = PoolProperties(allocation=1, location=1)
    cuda("cudaMemPoolCreate", ctypes.byref(keeping), ctypes.byref(made))
    keeps = ctypes.c_uint64(2**64 - 1)
    cuda("cudaMemPoolSetAttribute", keeping, _RELEASE_THRESHOLD, ctypes.byref(keeps))
    before = cuda.free()
    steps: list[int] = []
    for _ in range(_PIECES):
        _from(cuda, keeping, stream, MIB)
        cuda("cudaStreamSynchronize", stream)
        taken = before - cuda.free()
        if not steps or taken != steps[-1]:
            steps.append(taken)
    mark("growth", asked=_PIECES * MIB, taken=steps[-1], steps=steps)
    _pieces(cuda, keeping, stream, "own")
    cuda("cudaMemPoolTrimTo", keeping, ctypes.c_size_t(0))
    mark("trimmed", taken=before - cuda.free())


def _from(cuda: Cuda, source: Any, stream: Any, size: int) -> ctypes.c_void_p:
    pointer = ctypes.c_void_p()
    cuda(
        "cudaMallocFromPoolAsync", ctypes.byref(pointer), ctypes.c_size_t(size), source, stream
    )  # fmt: skip
    return pointer


def _pieces(cuda: Cuda, source: Any, stream: Any, name: str) -> None:
    for mib in POOL_SIZES:
        cuda("cudaStreamSynchronize", stream)
        before = cuda.free()
        pointer = _from(cuda, source, stream, mib * MIB)
        cuda("cudaStreamSynchronize", stream)
        taken = before - cuda.free()
        cuda("cudaFreeAsync", pointer, stream)
        at_once = before - cuda.free()
        cuda("cudaStreamSynchronize", stream)
        mark(
            f"{name}_{mib}_mib", asked=mib * MIB, taken=taken, kept_at_once=at_once,
            kept_after_wait=before - cuda.free(),
        )  # fmt: skip


def _loaded(*names: str) -> None:
    loaded = [importlib.import_module(name) for name in names]
    # LMDeploy hides why its library does not load.
    available = getattr(loaded[-1], "is_available", lambda: True)()
    mark("loaded", available=bool(available))
    if not available:
        raise RuntimeError(f"the library of {names[-1]} does not load")
    context(Cuda())


def _handles() -> None:
    cuda = Cuda()
    context(cuda)
    handles(cuda, library("cublas"))


def _pool() -> None:
    cuda = Cuda()
    context(cuda)
    pool(cuda)


#: Each of a process of its own.
PARTS = {
    "plain": lambda: context(Cuda()),
    "torch": lambda: _loaded("torch"),
    "turbomind": lambda: _loaded("torch", "lmdeploy.turbomind"),
    "handles": _handles,
    "pool": _pool,
}


def main(words: list[str]) -> int:
    """What was marked before it failed counts."""
    mark("begin")
    try:
        PARTS[words[0]]()
    except (OSError, AttributeError, ImportError, RuntimeError) as exc:
        mark("failed", failed=f"{type(exc).__name__}: {exc}"[:300])
        return 1
    mark("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
