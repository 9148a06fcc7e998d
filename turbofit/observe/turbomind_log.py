"""What TurboMind and the server around it print, one line at a time, as typed events.

The formats are those of LMDeploy 0.15 to 0.18: ``[TM][LEVEL][MMDD.HH:MM:SS.uuuuuu][file.cc:line]``
before each message (0.16's ``core/logger.cc``; 0.18's binary has the same strings). TurboMind's
"MB" are MiB. Nothing here fails: a line that is not known gives None.
"""

from __future__ import annotations

import re
from typing import Final

from turbofit.core.struct import Struct
from turbofit.core.units import MIB

__all__ = [
    "Backpressure",
    "CacheBudget",
    "CheckFailed",
    "CudaError",
    "EngineFallback",
    "Event",
    "Frame",
    "NcclError",
    "PythonError",
    "ServerUp",
    "Slab",
    "StackTrace",
    "Starting",
    "TorchOutOfMemory",
    "VisionSetup",
    "WarmupFailed",
    "WarmupFinished",
    "WarmupLength",
    "WarmupLengths",
    "cached_tokens",
    "parse_line",
]

#: The cache's region is handed out in pages of this size, aligned to it (memory/page.h).
_PAGE: Final = 32 * MIB


class Starting(Struct, tag="starting"):
    """The engine object was made; contexts and weights come next."""


class CacheBudget(Struct, tag="cache_budget"):
    """The KV region, printed just before it is allocated; ``free`` is the minimum of the tp group.

    Both are rounded to hundredths of a MiB by the log.
    """

    budget: int
    free: int
    ratio: float


class Slab(Struct, tag="slab"):
    """How the region is cut; the first one of a rank is the KV block of all layers."""

    slab_size: int
    object_size: int
    object_count: int


class WarmupLengths(Struct, tag="warmup_lengths"):
    """The warm-up begins; requests of these many tokens will follow."""

    lengths: tuple[int, ...]


class WarmupLength(Struct, tag="warmup_length"):
    """The warm-up request of this many tokens begins."""

    tokens: int


class WarmupFailed(Struct, tag="warmup_failed"):
    """A warm-up request failed; status 6 only says that it is longer than a session."""

    tokens: int
    status: int


class WarmupFinished(Struct, tag="warmup_finished"):
    """The engine is ready for requests."""

    seconds: float


class Backpressure(Struct, tag="backpressure"):
    """A request waits: normal under load; in the warm-up a hang, where this line never stops."""

    cause: str
    at: int
    of: int


class CudaError(Struct, tag="cuda_error"):
    """A CUDA call failed and the process aborts; ``driver`` for the driver's own interface.

    ``pinned``: it asked for page-locked host memory, not for a GPU's, if it is LMDeploy 0.18: that
    is told by the line of its source.
    """

    message: str
    driver: bool = False
    pinned: bool = False

    @property
    def out_of_memory(self) -> bool:
        """Whether memory, on the device or pinned, was what was missing."""
        return "out of memory" in self.message


class CheckFailed(Struct, tag="check_failed"):
    """One of TurboMind's own checks failed and the process aborts."""

    message: str


class NcclError(Struct, tag="nccl_error"):
    """NCCL refused."""

    message: str


class StackTrace(Struct, tag="stack_trace"):
    """The frames of an aborting thread follow, innermost first."""


class Frame(Struct, tag="frame"):
    """One frame of a `StackTrace`."""

    number: int
    name: str


class VisionSetup(Struct, tag="vision_setup"):
    """Images were batched into a forward pass; ``units`` are tiles or patches."""

    sequences: int
    images: int
    units: int


class TorchOutOfMemory(Struct, tag="torch_out_of_memory"):
    """Torch, which stages weights on the first GPU, found no memory; bytes where it said so."""

    message: str
    requested: int | None = None
    free: int | None = None

    @property
    def missing(self) -> int | None:
        """Bytes that were missing at least; None where torch does not say."""
        if self.requested is None or self.free is None or self.free >= self.requested:
            return None
        return self.requested - self.free


class PythonError(Struct, tag="python_error"):
    """The last line of a Python traceback."""

    name: str
    message: str

    @property
    def out_of_memory(self) -> bool:
        """Whether CUDA, not torch's allocator, found none: on the device or pinned."""
        return _CUDA_MEMORY.search(self.message) is not None


class ServerUp(Struct, tag="server_up"):
    """The HTTP server listens."""


class EngineFallback(Struct, tag="engine_fallback"):
    """LMDeploy would run its PyTorch engine instead of TurboMind."""

    message: str


Event = (
    Starting
    | EngineFallback
    | CacheBudget
    | Slab
    | WarmupLengths
    | WarmupLength
    | WarmupFailed
    | WarmupFinished
    | Backpressure
    | CudaError
    | CheckFailed
    | NcclError
    | StackTrace
    | Frame
    | VisionSetup
    | TorchOutOfMemory
    | PythonError
    | ServerUp
)

_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX: Final = re.compile(r"\[TM\]\[[A-Z]+\](?:\[[^\]]*\])?\[([^\]]*)\] (.*)")
#: Where LMDeploy 0.18 calls cudaHostAlloc: found by failing every such call (bench/faults).
_PINNED: Final = "allocator.cc:105"
#: How its checks print a CUDA call that they guard.
_CHECKED_CUDA: Final = "cudaSuccess out of memory"
_BUDGET: Final = re.compile(
    r"Object cache budget: ([\d.]+) MB from free ([\d.]+) MB and ratio ([\d.]+)"
)
_SLAB: Final = re.compile(r"slab_size (\d+), object_size (\d+), object_count (\d+), ratio")
_LENGTHS: Final = re.compile(r"Warm-up lengths: ([\d, ]+)")
_FINISHED: Final = re.compile(r"Warm-up finished in ([\d.]+) seconds")
_WARMUP_FAILED: Final = re.compile(r"Warm-up for (\d+) tokens failed with status (-?\d+)")
_WAIT: Final = re.compile(r"(hit resource limit|out of memory) at (\d+)/(\d+)")
_CUDA: Final = re.compile(r"CUDA ([Dd]river )?error: (.+)")
_VISION: Final = re.compile(
    r"\S+(?: \S+)? setup: mm_seqs=(\d+) images_batched=(\d+) images_skipped=\d+ patches=(\d+)"
)
_FRAME: Final = re.compile(r"\s+\[ ?(\d+)\] (.+) @ \S+:\d+\s*")
_TORCH: Final = re.compile(r"(?:torch\.(?:cuda\.)?)?OutOfMemoryError: (CUDA out of memory.*)")
_REQUESTED: Final = re.compile(r"Tried to allocate ([\d.]+) ([KMG]iB)")
_FREE: Final = re.compile(r"of which ([\d.]+) ([KMG]iB) is free")
_UNITS: Final = {"KiB": 1 << 10, "MiB": MIB, "GiB": 1 << 30}
_FALLBACK: Final = re.compile(r".*(Fallback to pytorch engine because .*)")
_PYTHON: Final = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit)): ?(.*)")
_NCCL: Final = re.compile(r".*(NCCL error .*)")
#: What torch, its cuBLAS and Triton say where CUDA itself has no memory.
_CUDA_MEMORY: Final = re.compile(
    r"CUDA (?:driver )?error: (?:out of memory|CUBLAS_STATUS_ALLOC_FAILED)"
    r"|Triton Error \[CUDA\]: out of memory"
)
#: How libstdc++ prints the exception that ended a process.
_THROWN: Final = re.compile(r"\s*what\(\):\s+(.+)")
#: CUDA's own name of the error, which CUB and Thrust print in front of its text.
_NO_MEMORY: Final = "cudaErrorMemoryAllocation"


def parse_line(line: str) -> Event | None:
    """The event that one line of a log tells of, or None."""
    text = _ANSI.sub("", line).rstrip() if "\x1b" in line else line.rstrip()
    match = _PREFIX.match(text)
    try:
        return _engine(match[2], match[1]) if match else _other(text)
    except ValueError:  # a figure that a torn line damaged
        return None


def cached_tokens(budget: int, slab: Slab, block_tokens: int) -> int:
    """Tokens that a KV region of this size holds: pages of 32 MiB, slabs of them, blocks in slabs.

    The region's start is rarely aligned, so that one page is taken off, as the engine loses it.
    """
    pages = max(0, budget - (_PAGE - 1)) // _PAGE
    slabs = pages // max(1, slab.slab_size // _PAGE)
    return slabs * (slab.slab_size // slab.object_size) * block_tokens


def _engine(text: str, place: str) -> Event | None:
    """A message of TurboMind, without its prefix, and the line of its source that printed it."""
    if match := _WAIT.fullmatch(text):
        cause = "memory" if match[1] == "out of memory" else "limit"
        return Backpressure(cause=cause, at=int(match[2]), of=int(match[3]))
    if text.isdecimal():
        return WarmupLength(tokens=int(text))
    if match := _BUDGET.match(text):
        budget, free = (round(float(match[i]) * MIB) for i in (1, 2))
        return CacheBudget(budget=budget, free=free, ratio=float(match[3]))
    if match := _SLAB.match(text):
        sizes = [int(match[i]) for i in (1, 2, 3)]
        if not all(sizes):
            return None
        return Slab(slab_size=sizes[0], object_size=sizes[1], object_count=sizes[2])
    if match := _LENGTHS.match(text):
        lengths = tuple(int(part) for part in match[1].split(",") if part.strip())
        return WarmupLengths(lengths=lengths)
    if match := _FINISHED.match(text):
        return WarmupFinished(seconds=float(match[1]))
    if match := _WARMUP_FAILED.match(text):
        return WarmupFailed(tokens=int(match[1]), status=int(match[2]))
    if match := _CUDA.match(text):
        pinned = place == _PINNED
        return CudaError(message=match[2], driver=bool(match[1]), pinned=pinned)
    if match := _VISION.match(text):
        return VisionSetup(sequences=int(match[1]), images=int(match[2]), units=int(match[3]))
    if text.startswith("Check failed: "):
        if text.endswith(_CHECKED_CUDA):
            return CudaError(message="out of memory")
        return CheckFailed(message=text.removeprefix("Check failed: "))
    if text.startswith("`max_context_token_num` is not set"):
        return Starting()
    return None


def _bytes(size: re.Match[str] | None) -> int | None:
    return round(float(size[1]) * _UNITS[size[2]]) if size else None


def _torch(text: str) -> TorchOutOfMemory:
    requested, free = (_bytes(one.search(text)) for one in (_REQUESTED, _FREE))
    return TorchOutOfMemory(message=text, requested=requested, free=free)


def _other(text: str) -> Event | None:
    """A line of Python, of the HTTP server, or of an aborting thread."""
    if match := _FRAME.fullmatch(text):
        return Frame(number=int(match[1]), name=match[2])
    if text.startswith("*** stacktrace of thread "):
        return StackTrace()
    if match := _THROWN.fullmatch(text):
        text = match[1]
        if cuda := _CUDA.match(text):
            return CudaError(message=cuda[2], driver=bool(cuda[1]))
        if _NO_MEMORY in text:
            return CudaError(message="out of memory")
        if text.startswith("CUDA out of memory"):
            return _torch(text)
    if match := _TORCH.match(text):
        return _torch(match[1])
    if match := _FALLBACK.fullmatch(text):
        return EngineFallback(message=match[1])
    if match := _NCCL.fullmatch(text):
        return NcclError(message=match[1])
    if match := _PYTHON.fullmatch(text):
        return PythonError(name=match[1], message=match[2])
    if "Uvicorn running on " in text:
        return ServerUp()
    return None
