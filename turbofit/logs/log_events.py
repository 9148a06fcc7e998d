"""The types of events that lines of a log report: of engines, torch, Python, the host, nvidia-smi.

`logs.log_reader` makes one event of a line; `logs.death` says which kind of death an event shows.
Sizes are bytes.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.struct import Struct
from turbofit.machine.nvidia_smi import MigSlice, SmiGpu, SmiProcess
from turbofit.machine.torch_memory import TorchMemory


class Starting(Struct):
    """The engine object exists; contexts and weights come next.

    ``session``: the limit of a session in tokens.
    """

    session: int | None = None


class Message(Struct):
    """The program's own words."""

    message: str


class EngineFallback(Message):
    """LMDeploy chose its PyTorch engine instead of TurboMind."""


class ImagesPrepared(Struct):
    """turbofit's own line on how the engine's process prepares images."""

    how: str


class CacheBudget(Struct):
    """The size of the KV cache, which the engine prints just before the allocation.

    ``budget``: bytes of the cache. ``free``: the fewest free bytes of a GPU of the engine.
    ``ratio``: the share of ``free`` that the cache takes. The log rounds to hundredths of a MiB.
    """

    budget: int
    free: int
    ratio: float


class Slab(Struct):
    """The bytes of a slab of the KV cache, and of an object in the slab.

    Of a rank's lines about slabs, the first describes the KV block of all layers.
    """

    slab_size: int
    object_size: int


class KvBlocks(Struct):
    """A BlockManager line (LMDeploy 0.2.2 to 0.14), which gives ``field`` a ``value``.

    ``block_size`` is in bytes, all other fields are counts.
    """

    field: str
    value: int


class WarmupLengths(Struct):
    """The warm-up begins; a request of each length follows."""


class WarmupLength(Struct):
    """The warm-up request with this number of tokens begins."""

    tokens: int


class WarmupFinished(Struct):
    """The engine is ready for requests."""


class LoadingWeights(Struct):
    """The progress bar of the PyTorch engine's weight loader."""


class Converting(Struct):
    """The progress bar of the loader in which TurboMind up to 0.14 converts the weights."""

    done: bool


class WarmingUp(Struct):
    """The progress bar of the PyTorch engine's warm-up; its cache is already allocated."""


class ServerUp(Struct):
    """The HTTP server listens."""


class Answered(Struct):
    """A request for a text was answered with status 200, so the server has served."""


class Backpressure(Struct):
    """A request waits: usual while the engine serves, a hang if the line repeats in the warm-up.

    ``cause``: ``memory`` if the cache has no room, ``limit`` at another limit.
    """

    cause: str


class VisionSetup(Struct):
    """Images were put into one forward pass."""


class _CudaFault(Message):
    """A failed CUDA call, in CUDA's own words."""

    @property
    def out_of_memory(self) -> bool:
        """Whether the device's memory or page-locked host memory ran out."""
        return "out of memory" in self.message


class CudaError(_CudaFault):
    """A CUDA call failed and the process aborts; ``driver``: the call is one of the driver's API.

    ``call`` is the line in the engine's source that made the call, if the log has it.
    """

    driver: bool = False
    call: str = ""


class LegacyCuda(_CudaFault):
    """A CUDA error as TurboMind before 0.15 prints it: ``CUDA runtime error: … FILE:LINE``."""

    where: str


class CheckFailed(Message):
    """One of TurboMind's own checks failed, and the process aborts."""


class NcclError(Message):
    """A call of NCCL's failed."""


class PeerMissing(Struct):
    """TurboMind up to 0.7.3 found no peer access between two GPUs."""

    a: int
    b: int


class Frame(Struct):
    """One frame of an aborting thread's stack; the log prints the innermost frame first."""

    name: str


class NoCache(Struct):
    """The PyTorch engine found too little free memory for ``what``: ``kv cache`` or ``runtime``."""

    what: str


class LoopFailed(Struct):
    """The PyTorch engine's loop ended; its error follows, and its server only answers 503."""


class LostLock(Struct):
    """The engine's process lost the lock that it shares with the server while both start."""


class VisionFrame(Struct):
    """A line of a traceback lies in the vision tower."""


class CacheFrame(Struct):
    """A line of a traceback lies in the allocation of the cache."""


class PythonFrame(Struct):
    """A frame of a Python traceback; ``code``: its source line, if the log has the line."""

    path: str
    function: str
    code: str = ""


class PythonError(Struct):
    """The last line of a Python traceback.

    ``out_of_memory``: CUDA itself, not torch's allocator, ran out of device or page-locked memory.
    """

    name: str
    message: str
    out_of_memory: bool = False


class ModelLoaded(Struct):
    """A progress bar of checkpoint shards reached its end."""


class HostKill(Struct):
    """The kernel killed a process for lack of memory.

    ``rss`` is the process's size in bytes. ``group``: a cgroup's limit was reached.
    """

    pid: int | None = None
    name: str = ""
    rss: int | None = None
    group: bool = False


class NoEvent(Struct):
    """The event of a log line that matches no known event."""


class KnownMessage(Struct):
    """A line that matches a row of `presets/causes.yaml`."""


class ServerFigures(Struct):
    """A line of counts, which LMDeploy's server logs every ten seconds.

    ``succeeded``: how many requests were answered since the server's start.
    """

    succeeded: int


#: Events that `serve` and a rehearsal need. Of these `diagnose` heeds only `NoCache`.
OF_LAUNCH: Final = (
    CacheFrame, EngineFallback, ImagesPrepared, LoadingWeights, LoopFailed, LostLock, NoCache,
    VisionFrame, WarmingUp,
)  # fmt: skip
#: Events about the machine, which hold for every run in a log.
OF_MACHINE: Final = (MigSlice, PeerMissing, SmiGpu, SmiProcess)
#: Events that end a process by themselves.
FATAL: Final = (CheckFailed, CudaError, HostKill, LegacyCuda, NcclError, PythonError, TorchMemory)
