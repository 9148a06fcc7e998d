"""GPU presets: one YAML file a card, names that people type, links, and what a context costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations
from typing import Final, Generic, Literal, TypeVar

import msgspec

from turbofit.core.machine import Gpu, Link, Pcie
from turbofit.core.presets import converted, load_yaml, preset_path, presets_dir, presets_of
from turbofit.core.struct import NA, Struct
from turbofit.core.units import MIB

Basis = Literal["published", "measured", "estimate"]
T = TypeVar("T")

#: The share by which the memory of one card differs at most: by drivers, and by ECC, which takes a
#: sixteenth of GDDR.
_SAME_MEMORY: Final = 0.07
_BRAND: Final = re.compile("nvidia|geforce|tesla|quadro")
_GIGABYTES: Final = re.compile(r"(\d)gi?b")
#: The gigabytes that a typed name has in it: ``3080 20GB``, ``a100-80``.
_TYPED_SIZE: Final = re.compile(r"(\d+)\s*gi?b?\b|-(\d{2,3})$", re.IGNORECASE)
_SIZE_WITHIN: Final = re.compile(r"(\b(?P<gb>\d+)\s*gi?b?\b)(.*)", re.IGNORECASE)
_SIZED_NAME: Final = re.compile(r".*-(\d+)gb?")
#: Files of `presets/gpus/` that are no card's.
_NO_CARDS: Final = frozenset({"aliases", "context", "unlisted", "unsupported"})
#: What a preset knows of a card, whatever of it is in use.
_CONSTANTS: Final = ("compute_capability", "sm_count", "l2", "memory_bandwidth", "dense_flops")


class Sourced(Struct, Generic[T], forbid_unknown_fields=True):
    """A figure with its source; ``low`` is the other end where several were seen."""

    value: T
    source: str
    basis: Basis = "published"
    sign: str = ""
    low: int | None = None


class PcieFigure(Struct, forbid_unknown_fields=True):
    """The card's PCIe link at best."""

    generation: int
    width: int
    source: str


class NvLink(Struct, forbid_unknown_fields=True):
    """NVLink: lanes of a card, lanes of a joined pair, bytes/s of a lane in one direction.

    ``default`` says whether a plain machine of these has it (modules) or it is bought apart.
    """

    lanes: int
    lanes_per_pair: int
    lane_bandwidth: int
    default: bool
    source: str


class Context(Struct, forbid_unknown_fields=True):
    """MiB that the CUDA context of one process holds; ``high`` is what a plan charges."""

    low: int
    high: int
    source: str
    basis: Basis
    sign: str


class GpuPreset(Struct, forbid_unknown_fields=True):
    """One file of `presets/gpus/`. See :class:`turbofit.core.machine.Gpu` for the units."""

    name: str
    total_mib: Sourced[int]
    reserved_mib: Sourced[int]
    compute_capability: Sourced[tuple[int, int]]
    sm_count: Sourced[int]
    l2: Sourced[int]
    memory_bandwidth: Sourced[int]
    dense_flops: Sourced[int]
    pcie: PcieFigure
    #: Between two such cards without NVLink, as the driver allows it by default.
    p2p: Sourced[Literal["none", "all"]]
    nvlink: NvLink
    context_mib: Context

    @property
    def total(self) -> int:
        """Bytes, as NVML reports them."""
        return self.total_mib.value * MIB

    @property
    def reserved(self) -> int:
        """Bytes that the driver keeps for itself."""
        return self.reserved_mib.value * MIB


class Assumed(Struct, forbid_unknown_fields=True):
    """What a name leaves open; ``several``: it only matters for more than one GPU."""

    when: Literal["always", "several"]
    note: str


class GpuNames(Struct, forbid_unknown_fields=True):
    """`presets/gpus/aliases.yaml`."""

    presets: dict[str, list[str]]
    twins: dict[str, list[str]]
    generations: dict[str, list[tuple[int, int]]]
    assumed: dict[str, Assumed]


class ContextRule(Struct, forbid_unknown_fields=True):
    """`presets/gpus/context.yaml`."""

    low_mib_per_sm: float
    high_base_mib: int
    high_mib_per_sm: int
    unknown_mib: int
    basis: Basis
    sign: str
    source: str


def preset_names() -> tuple[str, ...]:
    """All GPU presets: those that aliases.yaml lists, then what else is there."""
    return tuple(_names().presets)


@cache
def load_preset(key: str) -> GpuPreset:
    """Read one preset by its own name."""
    return read_table(preset_path("gpus", key).name, GpuPreset)


def find_preset(name: str) -> str | None:
    """The preset that a typed name or NVML's means; a size that is the card's stands anywhere."""
    index, sized = _index(), _SIZE_WITHIN.search(name)
    key = index.get(bare_name(name))
    if key is not None or sized is None:
        return key
    before = name[: sized.start()]
    known = index.get(bare_name(f"{before}{sized[3]}{sized[1]}"))
    return known or _of_size(index.get(bare_name(f"{before}{sized[3]}")), int(sized["gb"]))


def _of_size(key: str | None, gigabytes: int) -> str | None:
    """The preset, or one of cards of its name, that has so many gigabytes."""
    keys = () if key is None else (key, *_names().twins.get(key, ()))
    return next((one for one in keys if nominal_gigabytes(one) == gigabytes), None)


def presets_with(words: Iterable[str]) -> list[str]:
    """The presets with all of these words in one name, a generation's among them."""
    wanted, generations = [bare_name(word) for word in words], _names().generations
    capabilities = [generations[word] for word in wanted if word in generations]
    rest = [word for word in wanted if word not in generations]
    keys = {key for name, key in _index().items() if all(word in name for word in rest)}
    for allowed in capabilities:
        keys = {key for key in keys if load_preset(key).compute_capability.value in allowed}
    return [key for key in preset_names() if key in keys]


def nearest_names(name: str, count: int = 3) -> list[str]:
    """The known names most like an unknown one, best first; of its size if it has one."""
    import difflib

    index, typed = _index(), _TYPED_SIZE.search(name.strip())
    size = int(typed[1] or typed[2]) if typed else None
    close = difflib.get_close_matches(bare_name(name), list(index), n=8 * count, cutoff=0.62)
    keys = dict.fromkeys(index[match] for match in close)
    return [key for key in keys if size in (None, nominal_gigabytes(key))][:count]


def nominal_gigabytes(key: str) -> int:
    """The memory of a preset's card as its maker names it."""
    names = (key, *_names().presets.get(key, ()))
    sized = next(filter(None, map(_SIZED_NAME.fullmatch, names)), None)
    return int(sized[1]) if sized else round(load_preset(key).total_mib.value / 1024)


def assumed_note(name: str, count: int) -> str | None:
    """What was assumed for a name that leaves the memory size or the form of the card open."""
    wanted = bare_name(name)
    for typed, assumed in _names().assumed.items():
        if bare_name(typed) == wanted:
            return assumed.note if assumed.when == "always" or count > 1 else None
    return None


def match_preset(gpu: Gpu) -> GpuPreset | None:
    """The preset of a measured GPU, by its memory too: a name can be that of several cards.

    A part of a GPU (MIG) has none.
    """
    key = match_key(gpu)
    return None if key is None else load_preset(key)


def match_key(gpu: Gpu) -> str | None:
    """The name of the preset of a measured GPU; `GpuPreset.name` is NVML's, which several share."""
    return None if gpu.mig else _matched(gpu.name, gpu.total)


def fill(gpu: Gpu, preset: GpuPreset | None = None) -> Gpu:
    """The GPU with what NVML cannot read (L2, bandwidth, rate) taken from its preset."""
    preset = preset or match_preset(gpu)
    if preset is None:
        return gpu
    lacking = {name: getattr(preset, name).value for name in _CONSTANTS if getattr(gpu, name) == NA}
    pcie = {
        name: getattr(preset.pcie, name)
        for name in ("generation", "width")
        if getattr(gpu.pcie, name) == NA
    }
    return msgspec.structs.replace(gpu, pcie=msgspec.structs.replace(gpu.pcie, **pcie), **lacking)


def share_of(preset: GpuPreset, gpu: Gpu, whole: int) -> Gpu:
    """A part of a card (MIG) with its share of what the preset knows of the ``whole`` bytes.

    Bandwidth goes by memory, rate by SMs. L2 is the whole card's: what is sized by it errs high.
    """
    sms, rate = preset.sm_count.value, preset.dense_flops.value
    bandwidth = preset.memory_bandwidth.value
    return msgspec.structs.replace(
        gpu,
        l2=preset.l2.value,
        memory_bandwidth=NA if gpu.total == NA else bandwidth * min(gpu.total, whole) // whole,
        dense_flops=NA if gpu.sm_count == NA else rate * min(gpu.sm_count, sms) // sms,
        pcie=Pcie(generation=preset.pcie.generation, width=preset.pcie.width),
    )


def preset_links(
    presets: Sequence[GpuPreset | None],
    *,
    nvlink: frozenset[tuple[int, int]] | None = None,
    p2p: Literal["none", "all"] | None = None,
) -> tuple[Link, ...]:
    """The links of a machine that was described, GPU ``i`` being of ``presets[i]``.

    Args:
        presets: the card of each GPU, in index order; None where nothing is known to join it.
        nvlink: the pairs that NVLink joins; None for what such a machine has by default.
        p2p: peer access between all or no pairs; None for what the driver allows: over NVLink, and
            between some equal cards over PCIe. Unequal cards have none, which errs to replicas.
    """
    links = []
    for a, b in combinations(range(len(presets)), 2):
        first, second = presets[a], presets[b]
        if first is None or second is None:
            links.append(Link(a=a, b=b, p2p_read=p2p == "all", p2p_write=p2p == "all", nvlinks=0))
            continue
        same = first.name == second.name
        joined = (a, b) in nvlink if nvlink is not None else same and first.nvlink.default
        lanes = min(first.nvlink.lanes_per_pair, second.nvlink.lanes_per_pair) if joined else 0
        speed = min(first.nvlink.lane_bandwidth, second.nvlink.lane_bandwidth)
        allowed = p2p == "all" if p2p else joined or (same and first.p2p.value == "all")
        links.append(
            Link(
                a=a,
                b=b,
                p2p_read=allowed,
                p2p_write=allowed,
                nvlinks=lanes,
                nvlink_bandwidth=lanes * speed if lanes else NA,
            )
        )
    return tuple(links)


def context_bytes(gpu: Gpu) -> tuple[int, str]:
    """What one process's CUDA context holds on this GPU: bytes at the upper end, and a note.

    From the card's preset, else by the number of SMs, else the largest figure known. An estimate
    that errs high; kernels that libraries load later are not in it.
    """
    preset = match_preset(gpu)
    if preset is not None:
        context = preset.context_mib
        return context.high * MIB, _note(context.low, context.high, context.source)
    rule = _context_rule()
    if gpu.sm_count == NA:
        return rule.unknown_mib * MIB, f"at most {rule.unknown_mib} MiB on known cards"
    low = int(rule.low_mib_per_sm * gpu.sm_count)
    high = rule.high_base_mib + rule.high_mib_per_sm * gpu.sm_count
    return high * MIB, _note(low, high, f"rule for {gpu.sm_count} SMs from {rule.source}")


@cache
def _matched(name: str, total: int | Literal["NA"]) -> str | None:
    """The preset of a GPU's name whose memory is as large."""
    key = find_preset(name)
    if key is None or total == NA:
        return key
    twins: tuple[str, ...] = (key, *_names().twins.get(key, ()))
    for twin in twins:
        whole = load_preset(twin).total
        if abs(total - whole) <= _SAME_MEMORY * whole:
            return twin
    return None


def _note(low: int, high: int, source: str) -> str:
    return f"{low}-{high} MiB, upper end taken; {source}"


def bare_name(name: str) -> str:
    """``NVIDIA A100-SXM4-80GB`` and ``a100 sxm4 80g`` as ``a100sxm480g``."""
    bare = _BRAND.sub("", name.lower().replace("_", " "))
    return _GIGABYTES.sub(r"\1g", "".join(c for c in bare if c.isalnum()))


@cache
def _names() -> GpuNames:
    """What aliases.yaml lists, and other files' cards by their own names."""
    names = read_table("aliases.yaml", GpuNames)
    others = sorted(presets_of("gpus") - _NO_CARDS - set(names.presets))
    unlisted = {key: [load_preset(key).name] for key in others}
    return msgspec.structs.replace(names, presets=names.presets | unlisted)


@cache
def _index() -> dict[str, str]:
    return {
        bare_name(name): key for key, names in _names().presets.items() for name in (key, *names)
    }


@cache
def _context_rule() -> ContextRule:
    return read_table("context.yaml", ContextRule)


def read_table(file: str, type_: type[T]) -> T:
    """A file of `presets/gpus/`."""
    path = presets_dir() / "gpus" / file
    return converted(load_yaml(path), type_, path)
