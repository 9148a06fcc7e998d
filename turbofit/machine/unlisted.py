"""Cards without a preset: MIG slices, vGPU profiles, laptop cards, modified cards, any size."""

from __future__ import annotations

import re
from functools import cache
from typing import Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct
from turbofit.core.units import MIB
from turbofit.machine.presets import (
    bare_name,
    find_preset,
    load_preset,
    nearest_names,
    nominal_gigabytes,
    preset_names,
    read_table,
)

#: NVML's name of a MIG slice: ``NVIDIA A100-SXM4-80GB MIG 3g.40gb``; ``1c.3g.40gb`` is one of the
#: three compute slices in it.
MIG_NAME: Final = re.compile(
    r"(?P<card>.*?)\W*(?:\bMIG\W+)?"
    r"\b(?P<profile>(?:(?P<compute>\d)c\.)?(?P<slices>\d)g\.(?P<gb>\d{1,4})gb)"
    r"[+-]?[a-z.]*",
    re.IGNORECASE,
)
_VGPU: Final = re.compile(
    r"(?:nvidia\s+|grid\s+)*(?P<board>[a-z][\w -]*?)-(?:(?P<slices>\d)-)?(?P<gb>\d+)"
    r"(?P<series>[abcq])(?:me)?",
    re.IGNORECASE,
)
#: Words that mark a laptop card, anywhere in its bare name.
_LAPTOP: Final = re.compile(
    r"(?:with)?(?:laptop|mobile|notebook|maxq(?:design)?)(?:gpu)?(?:with)?|(?<=\d)m$"
)
_SIZED: Final = re.compile(
    r"(?P<card>.*?)[\s_(-]*\b(?P<gb>\d+)\s*gi?b?\b\)?(?P<more>.*)", re.IGNORECASE
)
#: The least share of a card's nominal gigabytes that CUDA can allocate: 0.91 on the T4 and the A2,
#: whose ECC takes a sixteenth, 0.98 on most. It is low, so a plan by it errs on the small side.
_LEAST_OF_NOMINAL: Final = 0.9
#: The share of a MIG profile's nominal gigabytes, if no driver's list is known (unlisted.yaml).
#: Low.
_SLICE_OF_NOMINAL: Final = 0.89
#: The most eighths of a card's memory for a number of compute slices, of a card with seven or four
#: of them. A profile whose name says more than that times this rounding does not exist.
_EIGHTHS: Final = {7: {1: 2, 2: 2, 3: 4, 4: 4, 7: 8}, 4: {1: 2, 2: 4, 4: 8}}
_ROUNDING: Final = 1.1
#: Compute capabilities whose cards have HBM, which loses no sixteenth to ECC.
_HBM: Final = frozenset({(7, 0), (8, 0), (9, 0), (10, 0), (10, 3)})


class UnsupportedCard(Struct, forbid_unknown_fields=True):
    """One row of `presets/gpus/unsupported.yaml`.

    ``names`` are regular expressions for the whole name, in lower case, without punctuation.
    """

    names: tuple[str, ...]
    card: str
    why: str
    instead: str


class _MigCards(Struct, forbid_unknown_fields=True):
    """The MIG profiles of these presets' cards: MiB and SMs of each profile."""

    cards: tuple[str, ...]
    slices: int
    profiles: dict[str, tuple[int, int]]
    source: str


class SlowCards(Struct, forbid_unknown_fields=True):
    """Cards that run LMDeploy's kernels without the tensor cores that these need for speed."""

    cards: str
    flops: int
    note: str
    source: str


class _Unlisted(Struct, forbid_unknown_fields=True):
    """`presets/gpus/unlisted.yaml`: gigabytes of each card, by its compute capability."""

    mig: tuple[_MigCards, ...]
    vgpu: dict[str, str]
    cards: dict[str, dict[str, tuple[int, ...]]]
    laptops: dict[str, dict[str, tuple[int, ...]]]
    slow: SlowCards


class OtherCard(NamedTuple):
    """A card without a preset: its ``name`` in a SPEC, compute capability, nominal gigabytes."""

    name: str
    laptop: bool
    known: str
    capability: tuple[int, int]
    sizes: tuple[int, ...]


def unsupported_card(name: str) -> UnsupportedCard | None:
    """The first row that matches a typed name; None if the card is not known as unsupported."""
    wanted = "".join(c for c in name.lower() if c.isalnum())
    for row in _unsupported()["cards"]:
        if any(re.fullmatch("|".join(row.names), form) for form in (wanted, name.lower())):
            return row
    return None


def other_card(name: str) -> OtherCard | None:
    """The facts known by name about a card without a preset; None if there are none."""
    sized = _SIZED.fullmatch(name)
    wanted = bare_name(f"{sized['card']}{sized['more']}" if sized else name)
    card, laptop = _LAPTOP.subn("", wanted)
    for capability, cards in (_table().laptops if laptop else _table().cards).items():
        for known, gigabytes in cards.items():
            if bare_name(known) in (card, f"rtx{card}", f"gtx{card}"):
                major, minor = map(int, capability.split("."))
                sizes = (int(sized["gb"]),) if sized else gigabytes
                return OtherCard(wanted, bool(laptop), known, (major, minor), sizes)
    return None


def slow_card(name: str) -> SlowCards | None:
    """The facts about the speed of a card without tensor cores; None for another card."""
    slow = _table().slow
    return slow if re.fullmatch(slow.cards, _LAPTOP.sub("", bare_name(name))) else None


def cut_card(key: str, profile: str) -> str:
    """The preset with this MIG profile, if the typed name leaves the card's memory open."""
    kind, dash, _ = key.rpartition("-")
    cards = [card for row in _table().mig if profile in row.profiles for card in row.cards]
    alike = (card for card in cards if dash and card.rpartition("-")[0] == kind)
    return key if key in cards else next(alike, key)


def mig_slice(key: str, profile: re.Match[str]) -> tuple[int, int, str]:
    """Bytes that CUDA can allocate in a MIG slice, its SMs, and the source of both.

    Raises:
        UsageError: the card has no such profile, or MIG does not exist on it.
    """
    row = next((row for row in _table().mig if key in row.cards), None)
    slices, gigabytes = int(profile["slices"]), int(profile["gb"])
    name, whole = f"{slices}g.{gigabytes}gb", load_preset(key)
    if row is None:
        cut = ", ".join(row.cards[0] for row in _table().mig)
        raise UsageError(f"{key} is no card that MIG cuts", hint=f"cut are {cut}")
    most = nominal_gigabytes(key) * _EIGHTHS[row.slices].get(slices, 0) / 8 * _ROUNDING
    if name in row.profiles:
        size, sms = row.profiles[name]
        basis = "as `nvidia-smi mig -lgip` lists it"
    elif gigabytes > most:
        known = ", ".join(row.profiles) or "of 1, 2 and 4 slices"
        raise UsageError(f"{key} has no MIG profile {name}", hint=f"known are {known}")
    else:
        size = int(gigabytes * 10**9 * _SLICE_OF_NOMINAL) // MIB
        sms = whole.sm_count.value * slices // row.slices
        basis = f"89% of the nominal {gigabytes} GB, as no list of this card has it"
    if profile["compute"]:
        sms = sms * min(int(profile["compute"]), slices) // slices
    return min(size * MIB, whole.total - whole.reserved), sms, basis


def vgpu_of(name: str) -> re.Match[str] | None:
    """The parts of a vGPU profile's name, such as GRID V100D-32C, or None."""
    return None if find_preset(name) else _VGPU.fullmatch(name.replace("_", " "))


def least_usable(gigabytes: float) -> int:
    """The least bytes that CUDA can allocate on a card of so many nominal gigabytes."""
    return int(gigabytes * _LEAST_OF_NOMINAL * 1024) * MIB


def no_preset(name: str) -> UsageError:
    """The error for a name that cannot be planned for; its hint says what to write instead."""
    name = name[:60]
    row = unsupported_card(name)
    if row is not None:
        return UsageError(f"{name} is {row.card}: {row.why}", hint=row.instead)
    return _slice(name) or _vgpu(name) or _other(name) or _refitted(name) or _unknown(name)


def _slice(name: str) -> UsageError | None:
    """The error for a MIG profile without its card; None for another name."""
    profile = MIG_NAME.fullmatch(name)
    if profile is None:
        return None
    wanted = f"{profile['slices']}g.{profile['gb']}gb".lower()
    rows = [row for row in _table().mig if wanted in row.profiles]
    hints = [f"{row.cards[0]}:total={row.profiles[wanted][0]}MiB:mig={wanted}" for row in rows[:5]]
    return UsageError(
        f"{name} is a MIG slice, of which card?", hint=" or ".join(hints) or f"CARD:mig={wanted}"
    )


def _vgpu(name: str) -> UsageError | None:
    """The error for a vGPU profile; its hint has the least memory that a guest gets.

    The estimate is low: it subtracts all 128 MB of page retirement. Source: NVIDIA, Virtual GPU
    Software User Guide, max-reserved-fb = profile / 16 + 16 + ECC's sixteenth + page retirement.
    """
    profile = vgpu_of(name)
    if profile is None:
        return None
    board, nominal = profile["board"], int(profile["gb"]) * 1024
    if not re.match("[a-z]{0,2}\\d|quadro|rtx|tesla|dc", bare_name(board)):
        return None  # the size of a model: qwen2-vl-2b
    if profile["series"].lower() in "ab":
        return UsageError(
            f"{name} is a vGPU profile without CUDA",
            hint=f"its C and Q profiles have it: {board}-{profile['gb']}C",
        )
    key = _table().vgpu.get(bare_name(board)) or find_preset(board)
    whole = load_preset(key) if key else None
    sixteenths = 1 if whole and whole.compute_capability.value in _HBM else 2
    size = nominal - nominal * sixteenths // 16 - 144
    if whole is not None:
        size = min(size, (whole.total - whole.reserved) // MIB)
    written = f"{key or bare_name(board)}:total={size}MiB"
    if key and profile["slices"]:
        written += f":mig={profile['slices']}g.{profile['gb']}gb"
    return UsageError(
        f"{name} is a vGPU profile: a part of a card's memory, and of its time",
        hint=f"{written} has its memory, the least by NVIDIA's formula, and the card's speed, as"
        " where no other vGPU works",
    )


def _other(name: str) -> UsageError | None:
    """The error for a card with known memory and compute capability, or for a laptop card."""
    other = other_card(name)
    if other is not None:
        written = [
            f"{other.name}:total={least_usable(gb) // MIB}MiB ({gb} GB)" for gb in other.sizes
        ]
        desk = f" of laptops, another chip than the desktop's {other.known}," * other.laptop
        return UsageError(
            f"{name} was read as a card{desk} of which only memory and compute capability are"
            " known",
            hint=f"{' or '.join(written)} says the least memory that CUDA gives programs on such a"
            " card",
        )
    if _LAPTOP.search(bare_name(name)):
        return UsageError(
            f"{name} is a card of laptops, which is another than the one of its number",
            hint=f"write what CUDA can hand out of it: {bare_name(name)}:total=NGiB",
        )
    return None


def _refitted(name: str) -> UsageError | None:
    """The error for a known card with a size that no card of this name has."""
    sized = _SIZED.fullmatch(name)
    key = find_preset(f"{sized['card']}{sized['more']}") if sized else None
    if sized is None or key is None:
        return None
    preset, gigabytes = load_preset(key), int(sized["gb"])
    size = gigabytes * 1024 * (preset.total - preset.reserved) // preset.total
    return UsageError(
        f"{name}: {key} has {nominal_gigabytes(key)} GB, and none with {gigabytes} GB is known",
        hint=f"{key}:total={size}MiB has its memory, and the speed of {key}",
    )


def _unknown(name: str) -> UsageError:
    """The error for an unknown name, with the nearest known names, of its size if it has one."""
    near = [f"{key} ({nominal_gigabytes(key)} GB)" for key in nearest_names(name)]
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return UsageError(
        f"no GPU preset is called {name!r}",
        hint=f"{guess}A card without a preset is written NAME:total=24GiB, or 24GB;"
        f" `turbofit gpus` lists {len(preset_names())}",
    )


@cache
def _table() -> _Unlisted:
    return read_table("unlisted.yaml", _Unlisted)


@cache
def _unsupported() -> dict[str, tuple[UnsupportedCard, ...]]:
    return read_table("unsupported.yaml", dict[str, tuple[UnsupportedCard, ...]])
