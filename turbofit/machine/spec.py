"""``--on SPEC``: a machine in one line, or the output of ``nvidia-smi``.

Groups joined by ``+``, then machine options behind commas::

    [Nx]NAME[:key=value]…   total, used, free (of used and free one is enough; sizes or shares);
                            mig=3g.40gb (a part of the card); sm=8.6 (of a card without a preset);
                            24GB is any card of that size
    ,nvlink=0-1+2-3         the pairs that NVLink joins (none: no pair)
    ,p2p=none|all           peer access between all pairs
    ,ram=64GiB              host memory
    ,cores=16               cores of the host, which prepare images

GPUs are numbered in the order of the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, Literal, NoReturn

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu, Holder, Host, Link, Machine, named_cards
from turbofit.core.messages import counted, neighbours, plain
from turbofit.core.struct import NA, NaType, Struct
from turbofit.core.units import MIB, format_bytes, parse_bytes, parse_share, three_digits
from turbofit.machine.nvidia_smi import read_text
from turbofit.machine.presets import (
    COUNTS,
    GpuPreset,
    OtherSize,
    assumed_note,
    bare_name,
    fill,
    find_preset,
    load_preset,
    match_preset,
    preset_links,
    share_of,
)
from turbofit.machine.unlisted import (
    MIG_NAME,
    least_usable,
    mig_slice,
    no_preset,
    other_card,
    slow_card,
    unsupported_card,
)

#: The most GPUs of one machine: a SPEC with more GPUs has a typing error.
MAX_GPUS: Final = 64

#: The most cores of a host.
_MOST_CORES: Final = 4096

#: The most characters of a group; names of cards have up to 60.
_LONGEST: Final = 200

#: The most characters of a text that is read as another form. Each joint in it is a recursion, and
#: each recursion tries all forms; 400 characters of joints take 0.15 s.
_LONGEST_FORM: Final = 400
_EXAMPLE: Final = "write it like 4xrtx3090, 1xl4:free=19GiB or 4xrtx3090,nvlink=0-1+2-3"
_NUMBER: Final = re.compile(rf"(?<![a-z])(?:{'|'.join(COUNTS)})(?![a-z])", re.IGNORECASE)
#: Where the options of a machine begin.
_OPTION: Final = re.compile(r"(?=, ?(?:nvlink|p2p|ram|cores)=)")
_COUNT: Final = re.compile(r"(\d{1,3})\s*[x×*]\s*(.+)", re.IGNORECASE)
#: A separator between cards; the + of a MIG profile (1g.10gb+me) separates nothing.
_JOINT: Final = re.compile(r"\+(?!(?:me|gfx)\b)", re.IGNORECASE)
#: A size in the maker's gigabytes in place of a name, which means any card of this size.
_ANY: Final = re.compile(r"(\d{1,4}(?:\.\d)?)\s*gi?b?", re.IGNORECASE)
#: A name with the memory behind it, as nvidia-smi gives both.
_SMI_NAME: Final = re.compile(r"(?P<name>.+?)\s+(?P<mib>\d{3,7})\s*MiB", re.IGNORECASE)
_SIZE: Final = re.compile(r"\d+(?:\.\d+)? ?[gm]i?b?")
_CAPABILITY: Final = re.compile(r"(?:sm|cc)?[_ ]?(\d{1,2})\.?(\d)[a-z]?", re.IGNORECASE)
_PAIR: Final = re.compile(r"\s*(\d{1,3})\s*-\s*(\d{1,3})\s*")
#: The keys of a card, each with an example of its value.
_KEYS: Final = {"total": "24GiB", "used": "4GiB", "free": "19GiB", "mig": "3g.40gb", "sm": "8.6"}
#: The options of a machine, each with an example of its value.
_OPTIONS: Final = {"nvlink": "0-1+2-3", "p2p": "all", "ram": "64GiB", "cores": "16"}


class _Card(Struct):
    """An idle card; ``note`` says what was assumed about the card.

    ``preset`` is None if the links between such cards are unknown.
    """

    gpu: Gpu
    preset: GpuPreset | None
    note: str | None


def is_spec(text: str) -> bool:
    """Return whether a text is a valid SPEC.

    Error messages use this to find a SPEC that a person gave in place of another word.
    """
    try:
        parse_spec(text)
    except UsageError:
        return False
    return True


def parse_spec(spec: str) -> Machine:
    """Build the machine that a SPEC describes.

    Some other forms of text can mean only one machine (`_rewritten`). Such a text is read as the
    SPEC of that machine, with a warning. A form has one line and at most 400 characters.

    Raises:
        UsageError: a name, key, size or pair is not valid; the hint has a valid one.
    """
    spec = plain(spec)
    try:
        return _parsed(spec)
    except UsageError:
        if "\n" in spec or len(spec) > _LONGEST_FORM:
            raise
        counted = _NUMBER.sub(lambda word: f" {COUNTS[word[0].lower()]} ", spec)
        cards, *options = _OPTION.split(" ".join(counted.split()), 1)
        written = "".join([_rewritten(cards), *options])
        with suppress(UsageError):
            machine = _parsed(written)
            note = f"{spec} was read as {written}"
            return replace(machine, warnings=(note, *machine.warnings))
        raise


def _rewritten(text: str) -> str:
    """Return the SPEC that people write in this way: each form applies to what the last one made.

    presets/neighbours.yaml has the forms. They apply to each group of cards, too.
    """
    for form, meant in neighbours()["specs"]:
        if found := re.fullmatch(form, text, re.IGNORECASE):
            text = found.expand(meant)
    groups = _JOINT.split(text)
    return text if len(groups) < 2 else "+".join(_rewritten(group.strip()) for group in groups)


def in_other_size(spec: str, size: OtherSize) -> str:
    """Return the SPEC with the other card of a name in place of the card that was taken."""
    head, *options = spec.split(",")
    groups = []
    for group in _JOINT.split(head):
        text, *keys = group.strip().split(":")
        counted = _COUNT.fullmatch(text.strip())
        count, name = (f"{counted[1]}x", counted[2]) if counted else ("", text)
        named = bare_name(name) == bare_name(size.name)
        groups.append(":".join((f"{count}{size.spec if named else name}", *keys)))
    return ",".join(("+".join(groups), *options))


def _parsed(spec: str) -> Machine:
    """Build the machine of a SPEC, or of a text that nvidia-smi printed."""
    printed = read_text(spec)
    head, *tail = spec.split(",")
    cards = [card for text in printed or _JOINT.split(head) for card in _parse_group(text.strip())]
    if len(cards) > MAX_GPUS:
        _refuse(f"{len(cards)} GPUs", f"one machine has at most {MAX_GPUS}")
    options = _key_values([] if printed else tail, _OPTIONS, "machine option")
    gpus = tuple(
        replace(card.gpu, index=index, uuid=f"preset-{index}") for index, card in enumerate(cards)
    )
    notes = dict.fromkeys(card.note for card in cards if card.note)
    held = (
        f"GPU {gpu.index}: {format_bytes(int(gpu.used))} are held by others, as the pasted"
        " nvidia-smi says"
        for gpu in gpus
        if printed and gpu.used
    )
    return Machine(
        name=named_cards(gpus) if printed else " ".join(spec.split()),
        source="preset",
        gpus=gpus,
        links=_links(cards, options),
        host=_host(options),
        visible=tuple(range(len(cards))),
        warnings=(*notes, *held),
    )


def _links(cards: list[_Card], options: Mapping[str, str]) -> tuple[Link, ...]:
    """Return the links between the cards, by the options ``nvlink`` and ``p2p`` of the SPEC."""
    joined = _parse_pairs(options["nvlink"], cards) if "nvlink" in options else None
    peers = _parse_p2p(options["p2p"], cards) if "p2p" in options else None
    if peers == "none" and joined:
        _refuse("p2p=none contradicts nvlink: NVLinked GPUs are peers", "leave out one of the two")
    return preset_links([card.preset for card in cards], nvlink=joined, p2p=peers)


def _host(options: Mapping[str, str]) -> Host:
    """Return the described host, of which only cores and memory are known; all memory is free."""
    ram: int | NaType = parse_bytes(options["ram"], what="ram") if "ram" in options else NA
    cores = options.get("cores", "1")
    if not cores.isdecimal() or not 1 <= int(cores) <= _MOST_CORES:
        _refuse(f"cores={cores}", f"write 1 to {_MOST_CORES:,}, as in cores=16")
    cpus: int | NaType = int(cores) if "cores" in options else NA
    return Host(ram_total=ram, ram_available=ram, cpus=cpus)


def _parse_group(text: str) -> list[_Card]:
    """Parse one group of a SPEC, such as ``2xl4:free=19GiB``, into its equal cards."""
    head, *tail = text.split(":")
    counted = _COUNT.fullmatch(head.strip())
    count, name = (int(counted[1]), counted[2]) if counted else (1, head.strip())
    if not 0 < len(name) <= _LONGEST:
        _refuse(f"{name[:40]!r} is no name of a card", _EXAMPLE)
    if not 1 <= count <= MAX_GPUS:
        _refuse(f"{count}x{name[:40]}: no such group", f"a group has 1 to {MAX_GPUS} GPUs")
    given = _key_values(tail, _KEYS, "key")
    card = _card(name, count, given)
    return [replace(card, gpu=_sized(card.gpu, name, given))] * count


def _card(name: str, count: int, given: dict[str, str]) -> _Card:
    """Return the card of this name.

    ``given`` has the values of the keys behind the name, such as ``8.6`` of ``sm=8.6``.

    Raises:
        UsageError: no such card is known, or a key does not apply to the card.
    """
    if "mig" in given:  # the name becomes that of a slice in nvidia-smi's list
        name += f" MIG {given['mig']}"
    if profile := MIG_NAME.fullmatch(name):
        return _slice(profile, name, given)
    if printed := _SMI_NAME.fullmatch(name):
        preset = match_preset(_unused(printed["name"], int(printed["mib"]) * MIB))
    else:
        key = find_preset(name)
        preset = load_preset(key) if key else None
    if preset is None:
        return _any_card(name, given)
    if "sm" in given:
        _refuse(f"sm={given['sm']}: {name} has a preset with this figure", "leave sm out")
    note = assumed_note(name, count, sized="total" in given)
    gpu = fill(_unused(preset.name, preset.total, preset.reserved), preset)
    return _Card(gpu=gpu, preset=preset, note=note)


def _unused(name: str, total: int, reserved: int = 0) -> Gpu:
    return Gpu(
        index=0, uuid="", name=name, total=total, reserved=reserved, used=0, free=total - reserved
    )


def _slice(profile: re.Match[str], name: str, given: dict[str, str]) -> _Card:
    """Return a MIG instance, which has no links, even if the whole card has links."""
    key = find_preset(profile["card"])
    if key is None:
        raise no_preset(name)
    whole, (total, sms) = load_preset(key), mig_slice(key, profile["profile"])
    gpu = replace(
        _unused(f"{whole.name} MIG {profile['profile'].lower()}", total),
        mig=True,
        sm_count=sms,
        compute_capability=whole.compute_capability.value,
    )
    size = given.get("total", f"{total // MIB}MiB")
    note = (
        f"{name} was read as a MIG slice, {key}:total={size} with {sms} of"
        f" {whole.sm_count.value} SMs, as `nvidia-smi mig -lgip` lists the slice; its speed is"
        " this share of the card's speed, and an engine runs on one slice"
    )
    part = share_of(whole, gpu, whole.total - whole.reserved)
    return _Card(gpu=part, preset=None, note=note)


def _any_card(text: str, given: dict[str, str]) -> _Card:
    """Return a card without a preset, but of known memory.

    The compute capability is given, or known by the card's name, or unknown. An unknown figure
    counts as the most of all cards in memory, and as a slow card's in speed.
    """
    size, printed = _ANY.fullmatch(text), _SMI_NAME.fullmatch(text)
    name = printed["name"] if printed else text
    gigabytes = int(printed["mib"]) / 1024 if printed else 0.0
    if size:
        gigabytes = float(size[1])
    if not (gigabytes or "total" in given) or unsupported_card(name) or find_preset(name):
        raise no_preset(f"{name} {gigabytes:.0f}GB" if printed else text)
    capability = _capability(name, given.get("sm"))
    shown = f"{size[1]} GB card" if size else name
    gpu = replace(_unused(shown, least_usable(gigabytes)), compute_capability=capability or NA)
    total = f" of {format_bytes(int(gpu.total))} (nine tenths of {three_digits(gigabytes)} GB),"
    assumed = "{}.{}".format(*capability) if capability else "8.0 to 9.0 (write another as sm=12.0)"
    note = (
        f"{name} has no preset: it was read as any card{'' if 'total' in given else total} with "
        f"compute capability {assumed} and without peer access; unknown figures count in memory as "
        "the most of all cards, in speed as a slow card"
    )
    if slow := slow_card(name):
        gpu, note = replace(gpu, dense_flops=slow.flops), f"{note}; it {slow.note}"
    return _Card(gpu=gpu, preset=None, note=note)


def _capability(name: str, given: str | None) -> tuple[int, int] | None:
    """Return the compute capability from ``sm``, or from the card's name; None if it is unknown."""
    if given is None:
        other = other_card(name)
        return other.capability if other else None
    match = _CAPABILITY.fullmatch(given)
    if match is None:
        _refuse(f"sm={given} is no compute capability", "write it as sm=8.6")
    return int(match[1]), int(match[2])


def _sized(gpu: Gpu, name: str, given: dict[str, str]) -> Gpu:
    """Apply ``total``, ``used`` and ``free``.

    A given ``total`` is all that CUDA can allocate: nothing is reserved then. A percentage in
    ``used`` is of the card's total, a percentage in ``free`` of the total less the reserved bytes.
    What nvidia-smi printed may be more than CUDA can allocate by the preset, since drivers reserve
    different sizes; it counts as all, then.
    """
    total, reserved = int(gpu.total), int(gpu.reserved)
    printed = _SMI_NAME.fullmatch(name)
    most = int(printed["mib"]) * MIB if printed else 0
    if "total" in given:
        total, reserved, most = parse_bytes(given["total"], what=f"total of {name}"), 0, 0
    usable = total - reserved
    if total == 0:
        _refuse(
            f"{name} has a total of 0",
            "give the memory that CUDA can hand out, as in total=23028MiB",
        )

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
        if sizes[key] > max(usable, most):
            _refuse(
                f"{name}: {key}={format_bytes(sizes[key])} is more than the "
                f"{format_bytes(usable)} that CUDA can hand out",
                f"lower {key}, or give the total as well",
            )
        sizes[key] = min(usable, sizes[key])
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
        typed, _, value = (word.strip() for word in part.partition("="))
        key = typed.lower()
        if key in values:
            _refuse(f"{key} is given twice", f"give {key} once")
        if key not in known or not value:
            examples = ", ".join(f"{key}={value}" for key, value in known.items())
            join = "; + joins cards, and : joins the keys of a card"
            if known is _KEYS:
                size = f"; {typed} is free={typed}, or total={typed}"
                join = size if _SIZE.fullmatch(key) else ""
            _refuse(f"{part.strip()[:40]!r} is no {what}", f"{what}s are {examples}{join}")
        values[key] = value
    return values


def _parse_pairs(text: str, cards: list[_Card]) -> frozenset[tuple[int, int]]:
    """Parse the pairs of GPUs that NVLink joins, such as ``0-1+2-3``."""
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
                f"nvlink: {part.strip()} does not join two of {counted(len(cards), 'GPU')}",
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
    """Parse the option ``p2p``; MIG slices have no peers."""
    if text.lower() == "none":
        return "none"
    if text.lower() != "all":
        _refuse(f"p2p={text}", "p2p is none or all")
    if any(card.gpu.mig for card in cards):
        _refuse("p2p=all, but MIG slices have no peers", "leave p2p out")
    return "all"


def _refuse(cause: str, hint: str) -> NoReturn:
    raise UsageError(f"SPEC: {cause}", hint=hint)
