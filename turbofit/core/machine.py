"""What the hardware is: GPUs, programs that use their memory, links between GPUs, the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import combinations
from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from turbofit.core.messages import counted
from turbofit.core.struct import NA, NaType, Struct, const, doc, known

MACHINE_SCHEMA: Final = "turbofit.machine/1"
#: Types that bound the figures of a machine, which may come from a file: bytes, rates and counts.
Size = Annotated[int, Meta(ge=0, le=1 << 50)]
Rate = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
RateName = Literal["bandwidth", "cache_bandwidth", "flops", "vision_flops"]


class Holder(Struct):
    """A process that uses memory of a GPU; ``pid`` is `NA` if the process is not visible."""

    pid: int | NaType
    name: str
    bytes: int | NaType

    @property
    def label(self) -> str:
        """The name with the process id, as ``python[4711]``; remarks in brackets come last."""
        if self.pid == NA:
            return self.name
        name, bracket, remark = self.name.partition(" (")
        return f"{name}[{self.pid}]{bracket}{remark}"


class Pcie(Struct):
    """The best PCIe link of this slot, such as ``generation`` 4 and ``width`` 16 (lanes)."""

    generation: Size | NaType = NA
    width: Size | NaType = NA


class Gpu(Struct):
    """One GPU or MIG instance. Sizes in bytes; ``total = reserved + used + free`` (NVML v2).

    ``used`` is memory of other programs; ``free`` is the figure of ``cudaMemGetInfo`` before our
    context exists. ``memory_bandwidth`` is in bytes/s; ``dense_flops`` is dense 16-bit tensor
    FLOP/s with 32-bit accumulation. ``limit`` is the memory that HAMi or Volcano allows this
    container.
    """

    index: Annotated[int, Meta(ge=0)]
    uuid: str
    name: str
    total: Size | NaType
    reserved: Size | NaType
    used: Size | NaType
    free: Size | NaType
    compute_capability: tuple[int, int] | NaType = NA
    sm_count: Count | NaType = NA
    l2: Size | NaType = NA
    memory_bandwidth: Count | NaType = NA
    dense_flops: Count | NaType = NA
    pcie: Pcie = Pcie()
    mig: bool = False
    holders: tuple[Holder, ...] = ()
    limit: Annotated[int | UnsetType, doc("Bytes that HAMi or Volcano allows; else absent.")] = (
        UNSET
    )

    @property
    def usable(self) -> int:
        """Bytes that CUDA can allocate; a size that cannot be read counts as 0."""
        return known(self.total, 0) - known(self.reserved, 0)

    @property
    def ours(self) -> int:
        """Bytes of the GPU that this container may use: ``limit``; without a limit ``usable``."""
        return self.usable if isinstance(self.limit, UnsetType) else self.limit


class Link(Struct):
    """How two GPUs reach each other; ``a`` < ``b`` are their indices.

    ``nvlinks`` counts active NVLink lanes between the two; ``nvlink_bandwidth`` is their bytes/s in
    one direction; ``ancestor`` is NVML's common ancestor: ``internal``, ``single`` (one switch),
    ``multiple``, ``hostbridge``, ``node`` (one NUMA node) or ``system``.
    """

    a: int
    b: int
    p2p_read: bool | NaType = NA
    p2p_write: bool | NaType = NA
    nvlinks: int | NaType = NA
    nvlink_bandwidth: int | NaType = NA
    ancestor: str | NaType = NA

    @property
    def peers(self) -> bool:
        """Whether both GPUs can access each other's memory; False if that is unknown."""
        return self.p2p_read is True and self.p2p_write is True

    @property
    def nvlinked(self) -> bool:
        """Whether at least one NVLink lane joins the two."""
        return isinstance(self.nvlinks, int) and self.nvlinks > 0


class CardSpeed(Struct):
    """The measured speed of a card.

    ``bandwidth`` is bytes/s of a copy inside the card, ``flops`` FLOP/s of 16-bit matrix products.
    """

    index: int
    bandwidth: Rate
    flops: Rate


class PairSpeed(Struct):
    """The measured speed of a copy from GPU ``source`` to GPU ``target``.

    ``bandwidth`` is bytes/s, ``latency`` the seconds of a small copy. ``right``: every byte arrived
    unchanged. ``peer``: the copy used peer access, and was right. ``host_bandwidth`` is bytes/s of
    the same copy through pinned host memory.
    """

    source: int
    target: int
    peer: bool
    right: bool
    bandwidth: float
    latency: float
    host_bandwidth: float


class ReduceSpeed(Struct):
    """The seconds of NCCL's all-reduce of ``size`` bytes over ``gpus``.

    ``right``: the sums were right.
    """

    gpus: tuple[int, ...]
    size: Count
    seconds: Rate
    right: bool


class Measured(Struct):
    """The speeds that ``turbofit calibrate`` measured; GPUs are named by the machine's indices.

    ``left_out`` says in words which speeds were not measured, and why.
    """

    torch: str
    cards: tuple[CardSpeed, ...] = ()
    pairs: tuple[PairSpeed, ...] = ()
    reduces: tuple[ReduceSpeed, ...] = ()
    left_out: tuple[str, ...] = ()
    image_seconds: Annotated[
        float, doc("Processor seconds of one core for the reference photograph; 0: not measured.")
    ] = 0.0


class StepPoint(Struct):
    """One forward of an engine, with the seconds that it took.

    The forward decodes a token of each of ``sequences`` answers, reads a prompt of ``prompt``
    tokens, and encodes an image of ``units`` vision units. The answers have ``cached`` tokens in
    the cache together. ``seconds`` is a median; half of the readings are within the share
    ``spread``.
    """

    sequences: Count
    cached: Annotated[int, Meta(ge=0)]
    seconds: Annotated[float, Meta(gt=0, lt=1e4)]
    spread: Annotated[float, Meta(ge=0)] = 0.0
    prompt: Annotated[int, Meta(ge=0)] = 0
    units: Annotated[int, Meta(ge=0)] = 0

    @property
    def words(self) -> str:
        """The forward in words."""
        if self.units:
            return f"an image of {counted(self.units, 'vision unit')}"
        if self.prompt:
            beside = f" beside {self.sequences:,} sequences" if self.sequences > 1 else ""
            return f"a prompt of {self.prompt:,} tokens{beside}"
        context = self.cached // self.sequences
        return f"{counted(self.sequences, 'sequence')} of {context:,} tokens"


class MeasuredRate(Struct):
    """A rate that cards reached in timed forwards of one model, exact within the share ``spread``.

    ``of`` is the kind of the rate: ``bandwidth`` for reading weights, ``cache_bandwidth`` for
    reading keys and values, in bytes/s; ``flops`` for prompts, ``vision_flops`` for images, in
    FLOP/s.
    """

    of: RateName
    value: Annotated[float, Meta(gt=0, lt=1e18)]
    spread: Annotated[float, Meta(ge=0, lt=1)]

    def exceeds(self, gpu: Gpu) -> bool:
        """Whether the rate is more than the peak of a card."""
        peak = gpu.memory_bandwidth if "bandwidth" in self.of else gpu.dense_flops
        return peak != NA and self.value * (1 - self.spread) > peak


class MeasuredSteps(Struct):
    """Timed forwards of one engine; ``quant_policy`` is the number format of its KV cache."""

    quant_policy: int
    points: tuple[StepPoint, ...]
    left_out: Annotated[
        tuple[str, ...], doc("In words, which forwards were not measured, and why.")
    ] = ()
    weights: Annotated[
        str, doc("How the model's weights are stored; empty: rates are for no other model.")
    ] = ""
    rates: Annotated[tuple[MeasuredRate, ...], doc("Rates of the cards, for other models.")] = ()


class Calibration(Struct):
    """The result of ``turbofit calibrate`` for one model, one engine and cards of one kind.

    ``context`` and ``buffers`` are bytes per GPU that are added to the plan's estimates; negative
    bytes mean that the estimates were too large.
    """

    model: Annotated[str, doc("Name, architecture, parameters.")]
    engine: str
    engine_version: Annotated[str, doc("The account's generation.")]
    lmdeploy: Annotated[str, doc("The version that ran.")]
    gpus: Annotated[tuple[str, ...], doc("Names of one group's cards, sorted.")]
    driver: str
    communicator: str
    when: str
    context: Annotated[int, doc("Bytes for memory taken before the cache is sized.")]
    buffers: Annotated[int, doc("Bytes for memory taken after the cache is sized.")]
    pretend: Annotated[bool, doc("Measured on pretend GPUs; not valid for real cards.")] = False
    spread: Annotated[int, doc("Bytes by which the measured GPUs and launches differed.")] = 0
    torch: Annotated[str, doc("Version of torch; empty if unknown.")] = ""
    cuda: Annotated[str, doc("Version of CUDA's runtime; empty if unknown.")] = ""
    free: Annotated[int, doc("Free bytes of the group's fullest card before the context.")] = 0
    steps: Annotated[MeasuredSteps | None, doc("Timed forwards; null: not timed.")] = None

    @property
    def where(self) -> str:
        """The place of the measurement, in words."""
        return "on PRETEND GPUs" if self.pretend else "here"

    @property
    def total(self) -> int:
        """Bytes that both corrections together add to a GPU."""
        return self.context + self.buffers


class Host(Struct):
    """Memory in bytes and cores of the host.

    ``ram_available`` is the kernel's estimate, lowered to a cgroup's limit. ``cpus`` is the number
    of cores whose time this process may use, by its affinity and a cgroup's quota.
    """

    ram_total: Size | NaType = NA
    ram_available: Size | NaType = NA
    shm_available: Size | NaType = NA
    cpus: int | NaType = NA


class Machine(Struct, dict=True):
    """A machine as planning sees it.

    ``source`` is ``nvml``, ``preset`` or ``snapshot FILE``. ``visible`` are the indices of the GPUs
    that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; planning uses only these GPUs. ``measured``
    is None if the machine's speed was not measured. ``calibrations`` have the memory that launches
    on these cards took in addition to the formulas.
    """

    schema: Annotated[str, const(MACHINE_SCHEMA)] = MACHINE_SCHEMA
    name: str
    source: str
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...] = ()
    host: Host = Host()
    driver: str | NaType = NA
    cuda: str | NaType = NA
    visible: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    measured: Measured | None = None
    calibrations: Annotated[
        tuple[Calibration, ...], doc("Results of turbofit calibrate on these cards.")
    ] = ()

    def gpu(self, index: int) -> Gpu:
        """Return the GPU with this index in PCI order."""
        return next(gpu for gpu in self.gpus if gpu.index == index)

    def link(self, a: int, b: int) -> Link:
        """Return the link between two GPUs; if no link was read, all its facts are NA."""
        pair = (a, b) if a < b else (b, a)
        return self._by_pair.get(pair) or Link(a=pair[0], b=pair[1])

    @cached_property
    def _by_pair(self) -> dict[tuple[int, int], Link]:
        return {(link.a, link.b): link for link in self.links}

    def with_used(self, used: int) -> Machine:
        """Return the machine as if other programs used at least ``used`` bytes of each GPU."""
        gpus = []
        for gpu in self.gpus:
            taken = min(gpu.usable, max(used, known(gpu.used, 0)))
            gpus.append(replace(gpu, used=taken, free=gpu.usable - taken))
        return replace(self, gpus=tuple(gpus))

    def nvlinked(self, gpus: Sequence[Gpu]) -> bool:
        """Return whether NVLink joins every pair of these GPUs."""
        pairs = combinations([gpu.index for gpu in gpus], 2)
        return all(self.link(a, b).nvlinked for a, b in pairs)


def named_cards(gpus: Iterable[Gpu]) -> str:
    """Name GPUs by kind, in order of appearance: ``2x NVIDIA L4 + NVIDIA A10``."""
    counts = Counter(gpu.name for gpu in gpus)
    return " + ".join(f"{count}x {name}" if count > 1 else name for name, count in counts.items())
