"""What a line of a log tells, as types: what `observe` does not read from a living engine."""

from __future__ import annotations

from typing import Final

from turbofit.core.struct import Struct

__all__ = [
    "CONTEXT",
    "Computed",
    "DefaultSession",
    "HostKill",
    "KnownMessage",
    "KvBlocks",
    "LegacyCuda",
    "MigSlice",
    "ModelLoaded",
    "PeerMissing",
    "PythonFrame",
    "SmiDriver",
    "SmiGpu",
    "SmiProcess",
    "TorchMemory",
    "VisionForward",
]


#: A CUDA context and libraries of one process take less than so many bytes.
CONTEXT: Final = 3 << 29


class TorchMemory(Struct, tag="torch_memory"):
    """Torch's out-of-memory text, all its figures in bytes, rounded as it prints them.

    ``limit`` is torch's own for one process (set_per_process_memory_fraction). ``process`` is what
    torch's own process holds on the GPU, ``others`` the rest by pid; ``cached`` is reserved by
    torch's allocator but not allocated. ``pid``: the text calls this
    process by it. ``named`` False: this process may be one of the ``others``. ``context`` False:
    ``process`` leaves out the process's CUDA context.
    """

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
    def outside_torch(self) -> int:
        """Bytes of this process that neither torch's allocator nor a CUDA context explains."""
        if self.process is None or self.allocated is None or not self.context:
            return 0
        rest = self.process - self.allocated - (self.cached or 0)
        return rest if rest > CONTEXT else 0

    @property
    def figures(self) -> int:
        """How many figures were read."""
        values = (self.requested, self.total, self.free, self.process, self.allocated, self.cached)
        return sum(value is not None for value in values) + len(self.others)


class LegacyCuda(Struct, tag="legacy_cuda"):
    """TurboMind before 0.14: ``CUDA runtime error: … FILE:LINE``."""

    message: str
    where: str

    @property
    def out_of_memory(self) -> bool:
        """Whether memory was what was missing."""
        return "out of memory" in self.message


class KvBlocks(Struct, tag="kv_blocks"):
    """A line of the BlockManager (0.2.2 to 0.14): ``block_size`` in bytes, counts as they are."""

    field: str
    value: int


class VisionForward(Struct, tag="vision_forward"):
    """LMDeploy's Python vision tower (up to 0.15) ran over a batch of tiles of this shape."""

    shape: tuple[int, ...]


class PeerMissing(Struct, tag="peer_missing"):
    """TurboMind up to 0.7.3 found no peer access between two GPUs."""

    a: int
    b: int


class DefaultSession(Struct, tag="default_session"):
    """TurboMind's session length, as its start-up warning says it."""

    tokens: int


class Computed(Struct, tag="computed"):
    """TurboMind's scheduler put tokens ``start`` to ``end`` of a request into the next forward."""

    uid: int
    start: int
    end: int


class PythonFrame(Struct, tag="python_frame"):
    """A frame of a Python traceback; ``code`` is its line of source, where the log has it."""

    path: str
    function: str
    code: str = ""


class ModelLoaded(Struct, tag="model_loaded"):
    """A progress bar over checkpoint shards came to its end: ``shards`` of them."""

    shards: int


class HostKill(Struct, tag="host_kill"):
    """The kernel killed a process for memory; ``rss`` in bytes, ``group``: a cgroup's limit."""

    pid: int | None = None
    name: str = ""
    rss: int | None = None
    group: bool = False


class SmiDriver(Struct, tag="smi_driver"):
    """The head of an nvidia-smi table."""

    driver: str
    cuda: str


class SmiGpu(Struct, tag="smi_gpu"):
    """A GPU of an nvidia-smi table, of ``nvidia-smi -L``, or a line of a program's own list.

    Bytes are as the table counts them; ``count`` GPUs of a list share a line.
    """

    index: int
    name: str = ""
    count: int = 1
    used: int | None = None
    total: int | None = None


class MigSlice(Struct, tag="mig_slice"):
    """A MIG slice of the GPU before it: its profile, or its bytes as a table has them."""

    profile: str = ""
    total: int | None = None


class SmiProcess(Struct, tag="smi_process"):
    """A process of an nvidia-smi table."""

    gpu: int
    pid: int
    name: str
    used: int | None


class KnownMessage(Struct, tag="said"):
    """A line that a row of `presets/causes.yaml` has."""
