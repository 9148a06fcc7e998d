"""GPU presets: one YAML file a card, the names that people type, and what a CUDA context costs."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Final, Literal, TypeVar

import msgspec

from turbofit.core.machine import Gpu, Pcie
from turbofit.core.presets import converted, load_yaml, preset_path, presets_dir
from turbofit.core.struct import NA, Struct
from turbofit.core.units import MIB

__all__ = [
    "GpuPreset",
    "assumed_note",
    "context_bytes",
    "fill",
    "find_preset",
    "load_preset",
    "match_preset",
    "nearest_names",
    "preset_names",
]

Basis = Literal["published", "measured", "estimate"]
T = TypeVar("T")

#: Two cards of one name are the same where their memory differs by less than this: drivers, and
#: ECC, which takes a sixteenth of GDDR.
_SAME_MEMORY: Final = 0.07
_BRAND: Final = re.compile(r"\b(nvidia|geforce|tesla)\b")
_GIGABYTES: Final = re.compile(r"(\d)gi?b")
#: Files of `presets/gpus/` that are no card's.
_NO_CARDS: Final = frozenset({"aliases", "context", "unsupported"})


class Figure(Struct, forbid_unknown_fields=True):
    """A number with its source; ``low`` is the other end where several were seen."""

    value: int
    source: str
    basis: Basis = "published"
    sign: str = ""
    low: int | None = None


class Capability(Struct, forbid_unknown_fields=True):
    """A compute capability with its source."""

    value: tuple[int, int]
    source: str


class PcieFigure(Struct, forbid_unknown_fields=True):
    """The card's PCIe link at best."""

    generation: int
    width: int
    source: str


class P2p(Struct, forbid_unknown_fields=True):
    """Peer access between two such cards without NVLink, as the driver allows it by default."""

    value: Literal["none", "all"]
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
    total_mib: Figure
    reserved_mib: Figure
    compute_capability: Capability
    sm_count: Figure
    l2: Figure
    memory_bandwidth: Figure
    dense_flops: Figure
    pcie: PcieFigure
    p2p: P2p
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
    """The names of all GPU presets: those that aliases.yaml lists, then what else is there."""
    return (*_names().presets, *_unlisted())


@cache
def load_preset(key: str) -> GpuPreset:
    """Read one preset by its own name.

    Raises:
        UsageError: the installed file is damaged.
    """
    return _read(preset_path("gpus", key).name, GpuPreset)


def find_preset(name: str) -> str | None:
    """The preset that a typed name or a name of NVML means, or None."""
    return _index().get(_normal(name))


def nearest_names(name: str, count: int = 3) -> list[str]:
    """The known names most like one that was not found, best first."""
    import difflib

    index = _index()
    close = difflib.get_close_matches(_normal(name), list(index), n=4 * count, cutoff=0.5)
    return list(dict.fromkeys(index[match] for match in close))[:count]


def assumed_note(name: str, count: int) -> str | None:
    """What was assumed for a name that leaves the memory size or the form of the card open."""
    wanted = _normal(name)
    for typed, assumed in _names().assumed.items():
        if _normal(typed) == wanted:
            return assumed.note if assumed.when == "always" or count > 1 else None
    return None


def match_preset(gpu: Gpu) -> GpuPreset | None:
    """The preset of a measured GPU, by name and memory: one name can cover several cards.

    A part of a GPU (MIG) has none.
    """
    return None if gpu.mig else _matched(gpu.name, gpu.total)


def fill(gpu: Gpu) -> Gpu:
    """The GPU with what NVML cannot read (L2, bandwidth, rate) taken from its preset."""
    preset = match_preset(gpu)
    if preset is None:
        return gpu

    def known_or(value: Any, default: Any) -> Any:
        return default if value == NA else value

    return msgspec.structs.replace(
        gpu,
        compute_capability=known_or(gpu.compute_capability, preset.compute_capability.value),
        sm_count=known_or(gpu.sm_count, preset.sm_count.value),
        l2=known_or(gpu.l2, preset.l2.value),
        memory_bandwidth=known_or(gpu.memory_bandwidth, preset.memory_bandwidth.value),
        dense_flops=known_or(gpu.dense_flops, preset.dense_flops.value),
        pcie=Pcie(
            generation=known_or(gpu.pcie.generation, preset.pcie.generation),
            width=known_or(gpu.pcie.width, preset.pcie.width),
        ),
    )


def context_bytes(gpu: Gpu) -> tuple[int, str]:
    """What one process's CUDA context holds on this GPU: bytes at the upper end, and a note.

    From the preset of the card; else, for a card without one and for a MIG instance, by the number
    of SMs; else the largest figure known. An estimate that errs high; kernels that libraries load
    later are not in it.
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
def _matched(name: str, total: int | Literal["NA"]) -> GpuPreset | None:
    """The preset of a GPU's name whose memory is as large; a plan asks for few GPUs many times."""
    key = find_preset(name)
    if key is None:
        return None
    if total == NA:
        return load_preset(key)
    for preset in map(load_preset, (key, *_names().twins.get(key, ()))):
        if abs(total - preset.total) <= _SAME_MEMORY * preset.total:
            return preset
    return None


def _note(low: int, high: int, source: str) -> str:
    return f"{low}-{high} MiB, upper end taken; {source}"


def _normal(name: str) -> str:
    """``NVIDIA A100-SXM4-80GB`` and ``a100 sxm4 80g`` as ``a100sxm480g``."""
    bare = _BRAND.sub("", name.lower().replace("_", " "))
    return _GIGABYTES.sub(r"\1g", "".join(c for c in bare if c.isalnum()))


@cache
def _names() -> GpuNames:
    return _read("aliases.yaml", GpuNames)


@cache
def _unlisted() -> tuple[str, ...]:
    """Files without other spellings than their own name and the card's."""
    found = {path.stem for path in (presets_dir() / "gpus").glob("*.yaml")}
    return tuple(sorted(found - _NO_CARDS - set(_names().presets)))


@cache
def _index() -> dict[str, str]:
    index: dict[str, str] = {}
    unlisted = {key: [load_preset(key).name] for key in _unlisted()}
    for key, names in (_names().presets | unlisted).items():
        for name in (key, *names):
            index[_normal(name)] = key
    return index


@cache
def _context_rule() -> ContextRule:
    return _read("context.yaml", ContextRule)


def _read(file: str, type_: type[T]) -> T:
    path = presets_dir() / "gpus" / file
    return converted(load_yaml(path), type_, path)
