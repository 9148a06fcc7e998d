"""GPU presets, one YAML file for each card: figures, names, links, size of the CUDA context."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations
from typing import Final, Generic, Literal, NamedTuple, TypeVar

import msgspec

from turbofit.core.machine import Gpu, Link, Pcie
from turbofit.core.presets import presets_of, read_preset
from turbofit.core.struct import NA, Struct
from turbofit.core.units import MIB

Basis = Literal["published", "measured", "estimate"]
T = TypeVar("T")

#: The share by which drivers, and ECC (a sixteenth of GDDR), may change the memory of a card.
_SAME_MEMORY: Final = 0.07
_BRAND: Final = re.compile("nvidia|geforce|tesla|quadro")
_GIGABYTES: Final = re.compile(r"(\d)gi?b")
_SIZE_WITHIN: Final = re.compile(r"[\s_(-]*\b(\d+)\s*gi?b?\b\)?", re.IGNORECASE)
_SIZED_NAME: Final = re.compile(r".*-(\d+)gb?")
#: Files of `presets/gpus/` that do not describe one card.
_NO_CARDS: Final = frozenset({"aliases", "context", "unlisted", "unsupported"})
#: The fields that `fill` takes from a preset where NVML has no figure.
_CONSTANTS: Final = ("compute_capability", "sm_count", "l2", "memory_bandwidth", "dense_flops")
#: Words of numbers, as people count cards.
COUNTS: Final = {"one": 1, "一": 1, "单": 1, "two": 2, "dual": 2, "两": 2, "二": 2, "双": 2,
                 "three": 3, "三": 3, "four": 4, "四": 4, "eight": 8, "八": 8}  # fmt: skip
#: Chinese letters and their punctuation, as a class of a pattern has them.
_CHINESE: Final = "\u3000-\u9fff\uff00-\uffef"
#: A card's name in a text, with an optional size, and with a count before or behind the name. A
#: name that is only a number, such as 3090, needs a count.
_CARD: Final = re.compile(
    r"(?:(?<![A-Za-z0-9_.:])(?<!GPU )(?<!evice )(?<!ank )(?P<count>\d{1,2})"
    r"(?:\s*[x×*]\s*|\s*[张块片卡颗]\s*|(?<=[248]) )"
    rf"|(?P<word>{'|'.join(COUNTS)})\s?[张块片卡颗]?\s*)?"
    r"(?P<name>(?<![A-Za-z0-9_])"
    r"(?:(?:[Nn](?:VIDIA|vidia) |GeForce |Tesla )*(?:RTX|GTX|TITAN|Quadro) ?[A-Z]?\d{3,4}"
    r"(?: ?D\b)?(?: ?Ti)?(?: ?SUPER)?(?: Ada)?(?: Laptop)?"
    r"|(?:[Nn](?:VIDIA|vidia) |Tesla )*(?:[ABHLPTV]\d{1,4}S?|[abhv]\d{3})(?![A-Za-z0-9])"
    r"(?:-(?:SXM\d?|PCI[Ee]))?)"
    rf"|(?<=[x×*{_CHINESE} ])\d0[5-9]0(?: ?Ti)?(?: ?SUPER)?(?![A-WYZa-wyz\d_.-]))"
    r"(?:(?:[ -]{0,2}\(?| of )(?P<size>\d{2,3} ?[Gg](?:i?[Bb])?|\d{4,6} ?MiB)(?![A-Za-z0-9])\)?"
    r"(?! *(?:of |system |host |CPU )?"
    r"(?:RAM|DDR|free|used|swap|disk|SSD|together|in (?:all|total))))?"
    rf"(?:\s?[x×*]\s?(?P<times>\d)\b|\s?(?P<behind>\d|{'|'.join(COUNTS)})\s?[张块片卡颗])?"
)
_MAKER: Final = re.compile("NVIDIA|GeForce|Tesla|RTX|GTX|TITAN|Quadro")
MAY_BE_CARD: Final = re.compile(
    rf"RTX|GTX|TITAN|Tesla|NVIDIA|(?<![a-z])[ABHLPTV]\d|(?<![A-Za-z\d_])[abhv]\d\d\d"
    rf"|(?<=[x×*{_CHINESE} ])\d0\d0(?![A-WYZa-wyz\d_.-])"
).search


class Sourced(Struct, Generic[T], forbid_unknown_fields=True):
    """A figure with its source; ``low`` is the lowest value if several were seen."""

    value: T
    source: str
    basis: Basis = "published"
    sign: str = ""
    low: int | None = None


class PcieFigure(Struct, forbid_unknown_fields=True):
    """The fastest PCIe link of the card."""

    generation: int
    width: int
    source: str


class NvLink(Struct, forbid_unknown_fields=True):
    """NVLink of a card: lanes, lanes to one other card, bytes/s of a lane in one direction.

    ``default`` is true if machines with such cards usually have NVLink, as with SXM modules. It is
    false if the bridge is sold separately.
    """

    lanes: int
    lanes_per_pair: int
    lane_bandwidth: int
    default: bool
    source: str


class Context(Struct, forbid_unknown_fields=True):
    """MiB that one process's CUDA context takes; a plan counts ``high``."""

    low: int
    high: int
    source: str
    basis: Basis
    sign: str


class GpuPreset(Struct, forbid_unknown_fields=True):
    """One file of `presets/gpus/`; :class:`turbofit.core.machine.Gpu` has the units."""

    name: str
    total_mib: Sourced[int]
    reserved_mib: Sourced[int]
    compute_capability: Sourced[tuple[int, int]]
    sm_count: Sourced[int]
    l2: Sourced[int]
    memory_bandwidth: Sourced[int]
    dense_flops: Sourced[int]
    pcie: PcieFigure
    #: Peer access between two such cards without NVLink, as the driver allows it by default.
    p2p: Sourced[Literal["none", "all"]]
    nvlink: NvLink
    context_mib: Context

    @property
    def total(self) -> int:
        """The card's memory in bytes, as NVML reports it."""
        return self.total_mib.value * MIB

    @property
    def reserved(self) -> int:
        """Bytes that the driver reserves."""
        return self.reserved_mib.value * MIB


class Assumed(Struct, forbid_unknown_fields=True):
    """A note on a card whose name leaves its memory or form (such as SXM or PCIe) open.

    ``when`` says whether the note matters always, or only for several GPUs. ``other`` is the SPEC
    of the card that has this name and another size, of ``gigabytes`` as its maker counts them.
    """

    when: Literal["always", "several"]
    note: str
    other: str = ""
    gigabytes: int = 0


class GpuNames(Struct, forbid_unknown_fields=True):
    """The content of `presets/gpus/aliases.yaml`."""

    presets: dict[str, list[str]]
    twins: dict[str, list[str]]
    assumed: dict[str, Assumed]


class ContextRule(Struct, forbid_unknown_fields=True):
    """The content of `presets/gpus/context.yaml`: CUDA contexts on cards without a preset."""

    low_mib_per_sm: float
    high_base_mib: int
    high_mib_per_sm: int
    unknown_mib: int
    basis: Basis
    sign: str
    source: str


def preset_names() -> tuple[str, ...]:
    """Return the names of all GPU presets: those in aliases.yaml first, then the others."""
    return tuple(_names().presets)


@cache
def load_preset(key: str) -> GpuPreset:
    """Read one preset by its file's name."""
    return read_preset("gpus", key, GpuPreset)


def find_preset(name: str) -> str | None:
    """Return the preset's key for a name as typed or as in NVML, or None.

    The name may have the card's size at any place.
    """
    index, (rest, gigabytes) = _index(), split_size(name)
    key = index.get(bare_name(name))
    if key is not None or not gigabytes:
        return key
    exact, unsized = (index.get(bare_name(f"{rest}{size}")) for size in (f"{gigabytes}g", ""))
    namesakes = () if unsized is None else (unsized, *_names().twins.get(unsized, ()))
    return exact or next((it for it in namesakes if nominal_gigabytes(it) == gigabytes), None)


def split_size(name: str) -> tuple[str, int]:
    """Return a name without its gigabytes, and the gigabytes; 0 if it has none."""
    sized = _SIZE_WITHIN.search(name)
    return (_SIZE_WITHIN.sub("", name, count=1), int(sized[1])) if sized else (name, 0)


def presets_with(words: Iterable[str]) -> list[str]:
    """Return the presets with a name that contains all of these words."""
    wanted = [bare_name(word) for word in words]
    keys = {key for name, key in _index().items() if all(word in name for word in wanted)}
    return [key for key in preset_names() if key in keys]


def nearest_names(name: str, count: int = 3) -> list[str]:
    """Return the names of up to ``count`` presets that are most like an unknown name."""
    import difflib

    index = _index()
    close = difflib.get_close_matches(bare_name(name), list(index), n=8 * count, cutoff=0.62)
    return list(dict.fromkeys(index[match] for match in close))[:count]


def nominal_gigabytes(key: str) -> int:
    """Return the memory of a preset's card in GB, as its maker gives it."""
    names = (key, *_names().presets.get(key, ()))
    sized = next(filter(None, map(_SIZED_NAME.fullmatch, names)), None)
    return int(sized[1]) if sized else round(load_preset(key).total_mib.value / 1024)


def assumed_note(name: str, count: int, *, sized: bool = False) -> str | None:
    """Return the note on what is assumed of a card whose name leaves memory or form open.

    None if nothing is assumed. ``count`` is the number of such cards. ``sized``: the memory is
    given, and only the form (NVLink) can be assumed.
    """
    wanted = bare_name(name)
    for typed, assumed in _names().assumed.items():
        if bare_name(typed) == wanted:
            matters = not sized if assumed.when == "always" else count > 1
            return assumed.note if matters else None
    return None


class OtherSize(NamedTuple):
    """A name of two cards: the size that was taken, and the SPEC and size of the other card.

    Sizes are in GB, as the maker counts them.
    """

    name: str
    taken: int
    spec: str
    gigabytes: int


def other_sizes(notes: Collection[str]) -> list[OtherSize]:
    """Return the names that were read as one card of two; ``notes`` are the machine's warnings."""
    return [
        OtherSize(name, nominal_gigabytes(key), assumed.other, assumed.gigabytes)
        for name, assumed in _names().assumed.items()
        if assumed.other and assumed.note in notes and (key := find_preset(name))
    ]


@cache
def usual_assumptions() -> frozenset[str]:
    """Return the notes on a card's usual size or form.

    Only a plan's full text contains these notes.
    """
    return frozenset(assumed.note for assumed in _names().assumed.values())


def match_preset(gpu: Gpu) -> GpuPreset | None:
    """Return the preset of a measured GPU, found by name and memory, since cards may share a name.

    None for a MIG instance, and for a card without a preset.
    """
    key = match_key(gpu)
    return None if key is None else load_preset(key)


def match_key(gpu: Gpu) -> str | None:
    """Return the name of a measured GPU's preset, found by the GPU's name and memory."""
    return None if gpu.mig else _matched(gpu.name, gpu.total)


def fill(gpu: Gpu, preset: GpuPreset | None = None) -> Gpu:
    """Return the GPU with figures that NVML lacks (L2, bandwidth, FLOP/s) taken from its preset."""
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
    """Return a MIG instance with its share of the preset's figures; the card has ``whole`` bytes.

    Bandwidth is shared by memory, FLOP/s by SMs. The L2 is that of the whole card; figures that
    depend on the L2 are therefore too high.
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
    """Return the links of a described machine, where GPU ``i`` has the preset ``presets[i]``.

    Args:
        presets: the card of each GPU, in index order; None if its links are unknown.
        nvlink: the pairs that NVLink joins; None for what such a machine has by default.
        p2p: peer access between all or no pairs; None for what the driver allows: over NVLink, and
            between some equal cards over PCIe. Unequal cards have no peer access, so plans prefer
            replicas.
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
    """Return the bytes of one process's CUDA context on this GPU (upper end), and a note.

    The size is from the card's preset; without a preset, from the number of SMs; without that
    number, it is the largest size of all presets. The estimate is high, but it omits kernels that
    libraries load later.
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


def is_measured(gpu: Gpu) -> bool:
    """Return whether a run of `bench/gpu` measured contexts and libraries on this card."""
    preset = match_preset(gpu)
    return preset is not None and "bench/gpu" in preset.context_mib.source


@cache
def _matched(name: str, total: int | Literal["NA"]) -> str | None:
    """Return the key of the preset with this name and nearly ``total`` bytes of memory."""
    key = find_preset(name)
    if key is None or total == NA:
        return key
    twins: tuple[str, ...] = (key, *_names().twins.get(key, ()))
    for twin in twins:
        whole = load_preset(twin).total
        if abs(total - whole) <= _SAME_MEMORY * whole:
            return twin
    return None


def spec_name(name: str, total: int) -> str:
    """Return the SPEC of a card with the chip of ``name`` and about ``total`` usable bytes.

    If no known card of the chip has this memory, the SPEC states the size. An unknown name, or any
    name if ``total`` is 0, is returned unchanged.
    """
    found = find_preset(name)
    if found is None or not total:
        return name
    chip = found.partition("-")[0]
    for key in (found, *(key for key in presets_with([chip]) if key.partition("-")[0] == chip)):
        preset = load_preset(key)
        if abs(preset.total - preset.reserved - total) <= total * _SAME_MEMORY:
            return key
    return f"{found}:total={total // MIB}MiB"


def nearest_in_memory(total: int) -> str:
    """Return the card with the usable memory that is nearest to ``total`` bytes."""
    usable = {key: load_preset(key).total - load_preset(key).reserved for key in preset_names()}
    return min(usable, key=lambda key: abs(usable[key] - total))


def _note(low: int, high: int, source: str) -> str:
    return f"{low}-{high} MiB, upper end taken; {source}"


def bare_name(name: str) -> str:
    """Return a name reduced for comparison: ``NVIDIA A100-SXM4-80GB`` becomes ``a100sxm480g``."""
    bare = _BRAND.sub("", name.lower().replace("_", " "))
    return _GIGABYTES.sub(r"\1g", "".join(c for c in bare if c.isalnum()))


@cache
def _names() -> GpuNames:
    """Return the content of aliases.yaml, with all other presets under their NVML names."""
    names = read_preset("gpus", "aliases", GpuNames)
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
    return read_preset("gpus", "context", ContextRule)


class NamedCards(NamedTuple):
    """Cards of one kind that a text names.

    ``name`` is the cards' name in a SPEC. ``number`` is 0 if the text gives no number. ``sized``:
    the text gives the memory.
    """

    chip: str
    name: str
    number: int
    sized: bool


def cards_in(text: str) -> Iterator[NamedCards]:
    """Yield the cards that a text names; cards without a name in a SPEC are left out."""
    for match in _CARD.finditer(text):
        name = match["name"].removesuffix(" Laptop")
        told = next(filter(None, match.group("count", "times", "word", "behind")), "0")
        number = int(COUNTS.get(told, told))
        key = find_preset(match["name"]) or (match["name"] if _MAKER.match(name) else None)
        if key is None:
            continue
        chip = key.partition("-")[0]
        size_text = match["size"] or "0"
        size = round(int(re.sub(r"\D", "", size_text)) / (1024 if "MiB" in size_text else 1))
        # The size chooses among the known cards of this name; any other size stays in the name.
        if size and find_preset(f"{name} {size}GB"):
            key = str(find_preset(f"{name} {size}GB"))
        elif size and find_preset(key) and abs(size - nominal_gigabytes(key)) > size / 10:
            key = f"{name} {size}GB"
        yield NamedCards(chip, key, number, size > 0)
