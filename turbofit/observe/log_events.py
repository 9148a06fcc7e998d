"""What logs tell, as types: events of engines, torch, Python, the host and nvidia-smi.

`observe.log_reader` makes them, one of a line; `observe.engine_end` says which kind of death one
tells of. Sizes are bytes.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.struct import Struct
from turbofit.machine.nvidia_smi import MigSlice, SmiGpu, SmiProcess

#: A CUDA context and libraries of one process take less than so many bytes.
CONTEXT: Final = 3 << 29


class Starting(Struct):
    """The engine object was made; contexts and weights come next. ``session``: its length."""

    session: int | None = None


class EngineFallback(Struct):
    """LMDeploy would run its PyTorch engine instead of TurboMind."""

    message: str


class ImagesPrepared(Struct):
    """How this engine's process prepares images; turbofit's own line."""

    how: str


class CacheBudget(Struct):
    """The KV region, printed just before it is allocated; ``free`` is the minimum of the tp group.

    Both are rounded to hundredths of a MiB by the log.
    """

    budget: int
    free: int
    ratio: float


class Slab(Struct):
    """How the region is cut; the first one of a rank is the KV block of all layers."""

    slab_size: int
    object_size: int


class KvBlocks(Struct):
    """A line of the BlockManager (0.2.2 to 0.14): ``block_size`` in bytes, counts as they are."""

    field: str
    value: int


class WarmupLengths(Struct):
    """The warm-up begins; requests of these many tokens will follow."""

    lengths: tuple[int, ...]


class WarmupLength(Struct):
    """The warm-up request of this many tokens begins."""

    tokens: int


class WarmupFinished(Struct):
    """The engine is ready for requests."""


class LoadingWeights(Struct):
    """The PyTorch engine's bar of its weight loader."""


class WarmingUp(Struct):
    """The PyTorch engine's bar of its warm-up: the cache is there."""


class ServerUp(Struct):
    """The HTTP server listens."""


class Backpressure(Struct):
    """A request waits: normal under load; in the warm-up a hang, where this line never stops."""

    cause: str


class Computed(Struct):
    """TurboMind's scheduler put tokens ``start`` to ``end`` of a request into the next forward."""

    uid: int
    start: int
    end: int


class VisionSetup(Struct):
    """Images were batched into a forward pass; ``units`` are tiles or patches."""

    sequences: int
    images: int
    units: int


class _CudaFault(Struct):
    message: str

    @property
    def out_of_memory(self) -> bool:
        """Whether memory, on the device or pinned, was what was missing."""
        return "out of memory" in self.message


class CudaError(_CudaFault):
    """A CUDA call failed and the process aborts; ``driver`` for the driver's own interface.

    ``call`` is the line of the engine's source that made it, where the log has it.
    """

    driver: bool = False
    call: str = ""


class LegacyCuda(_CudaFault):
    """TurboMind before 0.14: ``CUDA runtime error: … FILE:LINE``."""

    where: str


class CheckFailed(Struct):
    message: str


class NcclError(Struct):
    message: str


class PeerMissing(Struct):
    """TurboMind up to 0.7.3 found no peer access between two GPUs."""

    a: int
    b: int


class Frame(Struct):
    """One frame of an aborting thread's stack, innermost first."""

    name: str


class NoCache(Struct):
    """The PyTorch engine found too little free for ``what``: ``kv cache`` or ``runtime``."""

    what: str


class LoopFailed(Struct):
    """The PyTorch engine's loop ended; what ended it follows. Its server answers 503 for ever."""


class LostLock(Struct):
    """The engine's process lost the lock that it shares with the server while both start."""


class VisionFrame(Struct):
    """A traceback passes through the vision tower."""


class CacheFrame(Struct):
    """A traceback passes through the allocation of the cache."""


class PythonFrame(Struct):
    """A frame of a Python traceback; ``code`` is its line of source, where the log has it."""

    path: str
    function: str
    code: str = ""


class PythonError(Struct):
    """The last line of a Python traceback.

    ``out_of_memory``: CUDA, not torch's allocator, found none, on the device or pinned.
    """

    name: str
    message: str
    out_of_memory: bool = False


class TorchMemory(Struct):
    """Torch's out-of-memory text, all its figures in bytes, rounded as it prints them.

    ``limit`` is torch's own for one process (set_per_process_memory_fraction). ``process`` is what
    torch's own process holds on the GPU, ``others`` the rest by pid; ``cached`` is reserved by
    torch's allocator but not allocated. ``pid``: the text calls this
    process by it. ``named`` False: this process may be one of the ``others``. ``context`` False:
    ``process`` leaves out the process's CUDA context.
    """

    message: str = ""
    requested: int | None = None
    gpu: int | None = None
    total: int | None = None
    free: int | None = None
    limit: int | None = None
    process: int | None = None
    allocated: int | None = None
    cached: int | None = None
    pid: int | None = None
    others: tuple[tuple[int, int], ...] = ()
    named: bool = True
    context: bool = True

    @property
    def missing(self) -> int | None:
        """Bytes that were missing at least; None where torch does not say."""
        if self.requested is None or self.free is None or self.free >= self.requested:
            return None
        return self.requested - self.free

    @property
    def outside_torch(self) -> int:
        """Bytes of this process that neither torch's allocator nor a CUDA context explains."""
        if self.process is None or self.allocated is None or not self.context:
            return 0
        rest = self.process - self.allocated - (self.cached or 0)
        return rest if rest > CONTEXT else 0

    @property
    def figures(self) -> int:
        values = (self.requested, self.total, self.free, self.process, self.allocated, self.cached)
        return sum(value is not None for value in values) + len(self.others)


class ModelLoaded(Struct):
    """A progress bar over checkpoint shards came to its end."""


class HostKill(Struct):
    """The kernel killed a process for memory; ``rss`` in bytes, ``group``: a cgroup's limit."""

    pid: int | None = None
    name: str = ""
    rss: int | None = None
    group: bool = False


class KnownMessage(Struct):
    """A line that a row of `presets/causes.yaml` has."""


class ServerFigures(Struct):
    """What LMDeploy's server counts every ten seconds: requests since its start, and those now.

    ``made`` are tokens a second; the engine's two are None where the line does not name them.
    """

    succeeded: int
    failed: int
    made: float | None = None
    running: int | None = None
    waiting: int | None = None


#: What only a launch follows, and frames whose code a stack has anyway.
OF_LAUNCH: Final = (
    CacheFrame, EngineFallback, ImagesPrepared, LoadingWeights, LoopFailed, LostLock, NoCache,
    VisionFrame, WarmingUp,
)  # fmt: skip
#: What is true of the machine for each run of a log.
OF_MACHINE: Final = (MigSlice, PeerMissing, SmiGpu, SmiProcess)
#: Events that are an end by themselves.
FATAL: Final = (CheckFailed, CudaError, HostKill, LegacyCuda, NcclError, PythonError, TorchMemory)
