"""``--on SPEC``: a machine in one line, or what ``nvidia-smi`` prints.

Groups joined by ``+``, commas or lines; what has a ``=`` between commas is a machine option::

    [Nx]NAME[:key=value]…   total, used, free (of used and free one is enough; sizes or shares);
                            mig=3g.40gb (a part of the card); sm=8.6 (of a card without a preset);
                            NAMExN and N NAME mean the same; 24GB is any card of that size
    ,nvlink=0-1+2-3         the pairs that NVLink joins (none: no pair)
    ,p2p=none|all           peer access between all pairs
    ,ram=64GiB              host memory
    ,cores=16               cores of the host, which prepare images

GPUs are numbered in the order of the line.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu, Holder, Host, Link, Machine
from turbofit.core.nearest import plain
from turbofit.core.struct import NA, NaType, Struct
from turbofit.core.units import MIB, format_bytes, parse_bytes, parse_share, three_digits
from turbofit.machine.nvidia_smi import SmiGpu, listed, read_text
from turbofit.machine.presets import (
    GpuPreset,
    assumed_note,
    fill,
    find_preset,
    load_preset,
    match_preset,
    preset_links,
    share_of,
)
from turbofit.machine.unlisted import (
    MIG_NAME,
    cut_card,
    least_usable,
    mig_slice,
    no_preset,
    other_card,
    slow_card,
    unsupported_card,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: The most GPUs of one machine: a SPEC with more has a typing error.
MAX_GPUS: Final = 64

#: The most cores of a host.
_MOST_CORES: Final = 4096

#: The most characters of a group; names of cards have up to 60.
_LONGEST: Final = 200
_EXAMPLE: Final = "write it like 4xrtx3090, 1xl4:free=19GiB or 4xrtx3090,nvlink=0-1+2-3"
#: The forms of a count: ``4xrtx3090``; with the name of a card also ``4 RTX 3090`` and ``3090x4``.
_COUNT: Final = re.compile(r"(?P<count>\d{1,3})\s*[x×*]\s*(?P<name>.+)", re.IGNORECASE)
_COUNT_BEFORE: Final = re.compile(r"(?P<count>\d{1,3})\s+(?P<name>.+)")
_COUNT_BEHIND: Final = re.compile(r"(?P<name>.+?)\s*[x×*]\s*(?P<count>\d{1,3})", re.IGNORECASE)
#: ``0`` and ``cuda:1``: names of CUDA and torch for a GPU of this machine.
_INDEX: Final = re.compile(r"(?:cuda:|gpu ?)(\d{1,2})|\d", re.IGNORECASE)
#: The words after a name of several cards.
_CARDS: Final = re.compile(r"(?<=\d)s$|(?<!laptop)\s+(?:gpus?|cards?)$", re.IGNORECASE)
#: A separator between cards; the + of a MIG profile (1g.10gb+me) is not one.
_JOINT: Final = re.compile(r"\+(?!(?:me|gfx)\b)|\s+(?:and|&)\s+", re.IGNORECASE)
#: Any card of a size, in its maker's gigabytes; and a size that follows its card's name.
_ANY: Final = re.compile(
    r"(?:any\s+|gpu\s+)?(\d{1,4}(?:\.\d)?)\s*gi?b?(?:\s+(?:gpus?|cards?|vram))?", re.IGNORECASE
)
_SIZE: Final = re.compile(r"\d+\s*(?:[mg]i?b)", re.IGNORECASE)
#: Commas that do not separate cards: in 23,034 MiB, and after the first column of nvidia-smi's CSV.
_NO_PARTS: Final = re.compile(
    r"(?<=\d),(?=\d{3}(?:,\d{3})*\s*[KMGT]i?B)|^\s*\d+\s*,(?=.*MiB)", re.IGNORECASE | re.MULTILINE
)
#: A line of nvidia-smi's table.
_TABLE_LINE: Final = re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE)
#: Separators in nvidia-smi's output: before cards and slices of -L; and a name with its memory.
_SMI_LINES: Final = re.compile(r"[\n;]|(?=\bGPU\s+[\d,]+:)|(?=\bMIG\s+\S+\s+Device\b)")
_SMI_NAME: Final = re.compile(r"(?P<name>.+?)\s+(?P<mib>\d{3,7})\s*MiB", re.IGNORECASE)
_CAPABILITY: Final = re.compile(r"(?:sm|cc)?[_ ]?(\d{1,2})\.?(\d)[a-z]?", re.IGNORECASE)
#: The lowest compute capability for which LMDeploy has code.
_OLDEST: Final = (7, 0)
_PAIR: Final = re.compile(r"\s*(\d{1,3})\s*-\s*(\d{1,3})\s*")
#: The keys of a card, and the options of a machine, each with an example.
_KEYS: Final = {"total": "24GiB", "used": "4GiB", "free": "19GiB", "mig": "3g.40gb", "sm": "8.6"}
_OPTIONS: Final = {"nvlink": "0-1+2-3", "p2p": "all", "ram": "64GiB", "cores": "16"}


class _Card(Struct):
    """An idle card; ``note`` says what was assumed about it.

    ``preset`` is None if the links between such cards are unknown.
    """

    gpu: Gpu
    preset: GpuPreset | None
    note: str | None


def is_pasted(text: str) -> bool:
    """Whether a text is a table of nvidia-smi, so that its slash is not of a path."""
    return bool(_TABLE_LINE.search(text))


def is_spec(text: str) -> bool:
    """Whether a text is a valid SPEC; used where another kind of word is expected."""
    try:
        parse_spec(text)
    except UsageError:
        return False
    return True


def parse_spec(spec: str) -> Machine:
    """Build the machine that a SPEC describes.

    Raises:
        UsageError: a name, key, size or pair is not valid; the hint has the nearest one.
    """
    spec = plain(spec)
    printed = read_text(spec)
    if printed:
        spec = "\n".join(printed)
    if not spec:
        _refuse("it is empty", _EXAMPLE)
    texts, tail = _cards_and_options(spec)
    cards = [card for text in texts for card in _parse_group(text)]
    if len(cards) > MAX_GPUS:
        _refuse(f"{len(cards)} GPUs", f"one machine has at most {MAX_GPUS}")
    options = _key_values(tail, _OPTIONS, "machine option")
    gpus = tuple(
        replace(card.gpu, index=index, uuid=f"preset-{index}") for index, card in enumerate(cards)
    )
    notes = dict.fromkeys(card.note for card in cards if card.note)
    return Machine(
        name=_name(spec, gpus),
        source="preset",
        gpus=gpus,
        links=_links(cards, options),
        host=_host(options),
        visible=tuple(range(len(cards))),
        warnings=(*notes, *(_held_note(gpu) for gpu in gpus if printed and gpu.used)),
    )


def _links(cards: list[_Card], options: Mapping[str, str]) -> tuple[Link, ...]:
    joined = _parse_pairs(options["nvlink"], cards) if "nvlink" in options else None
    peers = _parse_p2p(options["p2p"], cards) if "p2p" in options else None
    if peers == "none" and joined:
        _refuse("p2p=none contradicts nvlink: NVLinked GPUs are peers", "leave out one of the two")
    return preset_links([card.preset for card in cards], nvlink=joined, p2p=peers)


def _host(options: Mapping[str, str]) -> Host:
    """The described host: its memory counts as available; all but memory and cores is unknown."""
    ram: int | NaType = parse_bytes(options["ram"], what="ram") if "ram" in options else NA
    return Host(ram_total=ram, ram_available=ram, cpus=_cores(options.get("cores")))


def _name(spec: str, gpus: Sequence[Gpu]) -> str:
    """The name of the machine: the SPEC, or its cards if the SPEC has UUIDs or several lines."""
    if "\n" not in spec and "UUID:" not in spec:
        return " ".join(spec.split())
    kinds = [(name, len(list(equal))) for name, equal in groupby(gpu.name for gpu in gpus)]
    return " + ".join(f"{count}x {name}" if count > 1 else name for name, count in kinds)


def _held_note(gpu: Gpu) -> str:
    held = format_bytes(int(gpu.used))
    return f"GPU {gpu.index}: {held} are held by others, as the pasted nvidia-smi says"


def _cards_and_options(spec: str) -> tuple[list[str], list[str]]:
    """Split a SPEC into the texts of its groups and of its machine options."""
    cards: list[str] = []
    options: list[str] = []
    for line in _lines(_NO_PARTS.sub("", spec)):
        alone = False  # whether a size may follow the card before
        for part in map(str.strip, line.split(",")):
            if not part or "=" in part.partition(":")[0] or part.lower() in _OPTIONS:
                options.append(part)
            elif alone and _SIZE.fullmatch(part):
                cards[-1], alone = f"{cards[-1]} {part}", False
            elif cards and _SIZE.fullmatch(part):
                _refuse(
                    f"{part} alone, behind a comma, is no card",
                    "give each card its size: l4:used=2GiB+l4:used=9GiB",
                )
            else:
                cards += map(str.strip, _JOINT.split(part))
                alone = not _ANY.fullmatch(cards[-1]) and ":" not in cards[-1]
    return cards, options


def _lines(spec: str) -> list[str]:
    """The lines of a SPEC; those of nvidia-smi become names of cards, or of slices of cut cards."""
    lines: list[str] = []
    whole = ""
    for line in map(str.strip, _SMI_LINES.split(spec)):
        told = listed(line)
        if isinstance(told, SmiGpu):
            whole = told.name
            lines.append(told.spec())
        elif told is not None:
            if lines[-1:] == [whole]:
                lines.pop()
            lines.append(f"{whole} MIG {told.profile}".strip())
        elif line:
            lines.append(line)
    return lines


def _parse_group(text: str) -> list[_Card]:
    if len(text) > _LONGEST:
        _refuse(f"{text[:40]}… is no card", _EXAMPLE)
    if match := _INDEX.fullmatch(text):
        index = match[1] or text
        hint = f"leave --on out and give --gpus {index} for the machine here; {_EXAMPLE}"
        cause = f"SPEC: {text} is a GPU's index, and no card's name"
        raise UsageError(cause, hint=hint, options=["on", "gpus"])
    head, *tail = text.split(":")
    given = _key_values(tail, _KEYS, "key")
    count, name = _counted(head.strip(), anything="total" in given)
    if not 1 <= count <= MAX_GPUS:
        _refuse(f"{count}x{name[:40]}: no such group", f"a group has 1 to {MAX_GPUS} GPUs")
    if not name:
        _refuse("a group has no GPU name", _EXAMPLE)
    card = _card(name, count, given)
    return [replace(card, gpu=_sized(card.gpu, name, given))] * count


def _counted(text: str, *, anything: bool) -> tuple[int, str]:
    """The count and the name in a group's text."""
    for pattern in (_COUNT_BEHIND, _COUNT_BEFORE, _COUNT):
        if match := pattern.fullmatch(text):
            name = _known(match["name"])
            if name is None and (pattern is _COUNT or (anything and pattern is _COUNT_BEFORE)):
                name = match["name"]
            if name is not None:
                return int(match["count"]), name
    return 1, _known(text) or text


def _known(name: str) -> str | None:
    """The name of a card, without a plural; None if the name is of no card."""
    for candidate in dict.fromkeys((name, _CARDS.sub("", name))):
        if find_preset(candidate) or _ANY.fullmatch(candidate) or MIG_NAME.fullmatch(candidate):
            return candidate
        if other_card(candidate) or unsupported_card(candidate):
            return candidate
    return None


def _card(name: str, count: int, given: dict[str, str]) -> _Card:
    """The card of this name; ``given`` has the keys, some of which only certain cards accept."""
    if "mig" in given:  # nvidia-smi writes slices this way
        name += f" MIG {given['mig']}"
    if profile := MIG_NAME.fullmatch(name):
        return _slice(profile, name, given)
    if "mig" in given:
        _refuse(f"mig={given['mig']} is no profile", "write it as nvidia-smi does: mig=3g.40gb")
    printed = _SMI_NAME.fullmatch(name)
    if printed and (preset := match_preset(_unused(printed["name"], int(printed["mib"]) * MIB))):
        return _Card(gpu=_of_preset(preset), preset=preset, note=None)
    key, bare = find_preset(name), printed["name"] if printed else name
    if key is None and unsupported_card(bare):
        raise no_preset(bare)
    if key is None:
        return _any_card(name, given)
    _refuse_capability(name, given)
    preset = load_preset(key)
    return _Card(
        gpu=_of_preset(preset),
        preset=preset,
        note=assumed_note(name, count, sized="total" in given),
    )


def _refuse_capability(name: str, given: dict[str, str]) -> None:
    """Refuse the key ``sm`` for a card whose preset has it."""
    if "sm" in given:
        _refuse(f"sm={given['sm']} of {name}, whose preset has it", "leave sm out")


def _of_preset(preset: GpuPreset) -> Gpu:
    return fill(_unused(preset.name, preset.total, preset.reserved), preset)


def _unused(name: str, total: int, reserved: int = 0) -> Gpu:
    free = total - reserved
    return Gpu(index=0, uuid="", name=name, total=total, reserved=reserved, used=0, free=free)


def _slice(profile: re.Match[str], name: str, given: dict[str, str]) -> _Card:
    """A MIG instance; it has no links to others, even if the cards have."""
    key = find_preset(profile["card"])
    if key is None:
        raise no_preset(name)
    if assumed_note(profile["card"], 1):
        key = cut_card(key, f"{profile['slices']}g.{profile['gb']}gb")
    _refuse_capability(name, given)
    whole, (total, sms, basis) = load_preset(key), mig_slice(key, profile)
    gpu = replace(
        _unused(f"{whole.name} MIG {profile['profile'].lower()}", total),
        mig=True,
        sm_count=sms,
        compute_capability=whole.compute_capability.value,
    )
    size = given.get("total", f"{total // MIB}MiB")
    note = (
        f"{name} was read as a MIG slice, {key}:total={size} with {sms} of"
        f" {whole.sm_count.value} SMs, {basis}; its speed is that share of the card's, and an"
        " engine runs on one slice"
    )
    part = share_of(whole, gpu, whole.total - whole.reserved)
    return _Card(gpu=part, preset=None, note=note)


def _any_card(text: str, given: dict[str, str]) -> _Card:
    """A card with known memory only, and with the compute capability if it is given or known.

    Unknown figures count at their upper end in memory, and as those of a slow card in speed.
    """
    name, shown, gigabytes = _named_size(text, given)
    capability = _capability(name, given.get("sm"))
    gpu = replace(_unused(shown, least_usable(gigabytes)), compute_capability=capability or NA)
    total = f" of {format_bytes(int(gpu.total))} (nine tenths of {three_digits(gigabytes)} GB),"
    known = "{}.{}".format(*capability) if capability else "8.0 to 9.0 (of another write sm=12.0)"
    note = (
        f"{name} has no preset: it was read as any card{'' if 'total' in given else total} with "
        f"compute capability {known} and without peer access; what is unknown counts in memory as "
        "the most of all cards, in speed as a slow one"
    )
    if slow := slow_card(name):
        gpu, note = replace(gpu, dense_flops=slow.flops), f"{note}; it {slow.note}"
    return _Card(gpu=gpu, preset=None, note=note)


def _named_size(text: str, given: dict[str, str]) -> tuple[str, str, float]:
    """The typed name of a card without a preset, its name in the plan, and its gigabytes.

    The gigabytes are 0 if only ``total`` says the size.

    Raises:
        UsageError: no size is given, or cards of this name have other sizes.
    """
    size, printed = _ANY.fullmatch(text), _SMI_NAME.fullmatch(text)
    name, shown, gigabytes, wanted = text, text, 0.0, text
    if size:
        shown, gigabytes = f"{size[1]} GB card", float(size[1])
    elif printed:
        name = shown = printed["name"]
        gigabytes = int(printed["mib"]) / 1024
        wanted = f"{name} {gigabytes:.0f}GB"
    unsized = gigabytes == 0 and "total" not in given
    if unsized or (printed and find_preset(name)):
        raise no_preset(wanted)
    return name, shown, gigabytes


def _capability(name: str, given: str | None) -> tuple[int, int] | None:
    """The compute capability from ``sm``, or from the card's name; None if it is unknown."""
    if given is None:
        other = other_card(name)
        return other.capability if other else None
    match = _CAPABILITY.fullmatch(given)
    if match is None:
        _refuse(f"sm={given} is no compute capability", "write it as sm=8.6")
    capability = int(match[1]), int(match[2])
    if capability < _OLDEST:
        oldest = "LMDeploy has no code below compute capability 7.0"
        _refuse(f"sm={given}: {oldest}", "take another card")
    return capability


def _sized(gpu: Gpu, name: str, given: dict[str, str]) -> Gpu:
    """Apply ``total`` (what CUDA can allocate, so nothing is reserved), ``used`` and ``free``.

    A share in ``used`` is of the total; a share in ``free`` is of what CUDA can allocate.
    """
    total, reserved = int(gpu.total), int(gpu.reserved)
    if "total" in given:
        total, reserved = parse_bytes(given["total"], what=f"total of {name}"), 0
    usable = total - reserved
    if total == 0:
        _refuse(f"{name} has a total of 0", "give what CUDA can hand out, as in total=23028MiB")

    sizes: dict[str, int] = {}
    for key, whole in (("used", total), ("free", usable)):
        if key not in given:
            continue
        what = f"{key} of {name}"
        share = parse_share(given[key], what)
        if share is None:
            sizes[key] = parse_bytes(given[key], what=what)
        else:
            sizes[key] = min(usable, int(whole * share))
        if sizes[key] > usable:
            _refuse(
                f"{name}: {key}={format_bytes(sizes[key])} is more than the "
                f"{format_bytes(usable)} that CUDA can hand out",
                f"lower {key}, or give the total as well",
            )
    if len(sizes) == 2 and sum(sizes.values()) != usable:
        _refuse(
            f"{name}: used {format_bytes(sizes['used'])} and free {format_bytes(sizes['free'])} do "
            f"not add up to {format_bytes(usable)} ({usable} bytes)",
            "give only one of used and free",
        )
    free = sizes.get("free", usable - sizes.get("used", 0))
    used = usable - free
    holders = (Holder(pid=NA, name="given in SPEC", bytes=used),) if used else ()
    return replace(gpu, total=total, reserved=reserved, used=used, free=free, holders=holders)


def _key_values(parts: list[str], known: Mapping[str, str], what: str) -> dict[str, str]:
    """Parse ``key=value`` parts into a dict; repeated or unknown keys are errors."""
    values: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if not equals or not value.strip():
            examples = ", ".join(f"{key}={value}" for key, value in known.items())
            _refuse(f"{part.strip()!r} is not key=value", f"{what}s are written {examples}")
        if key not in known and key in _KEYS:
            _refuse(
                f"{key} belongs to a card, not to the machine", f"write :{part.strip()} behind it"
            )
        if key not in known:
            _refuse(f"unknown {what} {key!r}", f"known are {', '.join(known)}")
        if key in values:
            _refuse(f"{key} is given twice", f"give {key} once")
        values[key] = value.strip()
    return values


def _parse_pairs(text: str, cards: list[_Card]) -> frozenset[tuple[int, int]]:
    if text.lower() == "none":
        return frozenset()
    pairs = set()
    for part in text.split("+"):
        match = _PAIR.fullmatch(part)
        if not match:
            _refuse(f"nvlink: {part.strip()!r} is not a pair", "write it like nvlink=0-1+2-3")
        a, b = sorted((int(match[1]), int(match[2])))
        if a == b or b >= len(cards):
            _refuse(
                f"nvlink: {part.strip()} does not join two of the {len(cards)} GPUs",
                f"GPUs are numbered from 0 to {len(cards) - 1} in the order of the SPEC",
            )
        for index in (a, b):
            preset = cards[index].preset
            if preset is None or preset.nvlink.lanes == 0:
                _refuse(
                    f"nvlink: GPU {index} ({cards[index].gpu.name}) has no NVLink",
                    "leave the pair out",
                )
        pairs.add((a, b))
    return frozenset(pairs)


def _parse_p2p(text: str, cards: list[_Card]) -> Literal["none", "all"]:
    if text.lower() == "none":
        return "none"
    if text.lower() != "all":
        _refuse(f"p2p={text}", "p2p is none or all")
    if any(card.gpu.mig for card in cards):
        _refuse("p2p=all, but MIG slices have no peers", "leave p2p out")
    return "all"


def _cores(text: str | None) -> int | NaType:
    if text is None:
        return NA
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_CORES:
        _refuse(f"cores={text}", f"write 1 to {_MOST_CORES:,}, as in cores=16")
    return int(text)


def _refuse(cause: str, hint: str) -> NoReturn:
    raise UsageError(f"SPEC: {cause}", hint=hint)
