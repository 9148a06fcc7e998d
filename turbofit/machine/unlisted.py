"""Cards without a preset: MIG slices, vGPUs, laptop cards, modified cards, and sizes (24GB)."""

from __future__ import annotations

import re
from functools import cache
from typing import Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.presets import read_preset
from turbofit.core.struct import Struct
from turbofit.core.units import MIB
from turbofit.machine.presets import (
    bare_name,
    find_preset,
    load_preset,
    nearest_names,
    nominal_gigabytes,
    preset_names,
    split_size,
)

#: NVML's name of a MIG slice: ``NVIDIA A100-SXM4-80GB MIG 3g.40gb``.
MIG_NAME: Final = re.compile(
    r"(?P<card>.*?)\W*(?:\bMIG\W+)?(?<![\w.])(?P<profile>\dg\.\d{1,4}gb)[+-]?[a-z.]*", re.IGNORECASE
)
#: A vGPU profile: GRID V100D-32C, NVIDIA A100-2-10C; a model's size (qwen2-vl-2b) does not match.
_VGPU: Final = re.compile(
    r"(?:nvidia |grid |tesla |quadro )*(?:[a-z]{0,2}\d|rtx)[\w -]*?-(?:\d-)?\d+[abcq](?:me)?",
    re.IGNORECASE,
)
#: Words that mark a laptop card, anywhere in its bare name.
_LAPTOP: Final = re.compile(r"(?:with)?(?:laptop|mobile|notebook|maxq(?:design)?)(?:gpu)?")
#: The least share of a card's nominal gigabytes that CUDA can allocate. The share is 0.91 on the T4
#: and the A2, where ECC takes a sixteenth, and 0.98 on most cards. A plan with
#: a share below the true one still fits.
_LEAST_OF_NOMINAL: Final = 0.9


class UnsupportedCard(Struct, forbid_unknown_fields=True):
    """One row of `presets/gpus/unsupported.yaml`.

    ``names`` are regular expressions for the whole name, in lower case, without punctuation.
    ``too_old``: no release of LMDeploy has code for the card.
    """

    names: tuple[str, ...]
    card: str
    why: str
    instead: str
    too_old: bool = False


class _MigCards(Struct, forbid_unknown_fields=True):
    """The MIG profiles of some cards with presets: MiB and SMs by the profile's name."""

    cards: tuple[str, ...]
    profiles: dict[str, tuple[int, int]]
    source: str


class SlowCards(Struct, forbid_unknown_fields=True):
    """Cards without tensor cores, on which LMDeploy's kernels run slowly."""

    cards: str
    flops: int
    note: str
    source: str


class _Unlisted(Struct, forbid_unknown_fields=True):
    """The content of `presets/gpus/unlisted.yaml`.

    ``cards`` and ``laptops`` have nominal gigabytes by compute capability and the card's name.
    """

    mig: tuple[_MigCards, ...]
    cards: dict[str, dict[str, tuple[int, ...]]]
    laptops: dict[str, dict[str, tuple[int, ...]]]
    slow: SlowCards


class OtherCard(NamedTuple):
    """A card without a preset: its ``name`` in a SPEC, compute capability, nominal gigabytes.

    ``known`` is the name of the desktop's card if ``laptop``; else it is the card's own name.
    """

    name: str
    laptop: bool
    known: str
    capability: tuple[int, int]
    sizes: tuple[int, ...]


def unsupported_card(name: str) -> UnsupportedCard | None:
    """Return the first row of unsupported cards that matches a typed name; None if no row does."""
    wanted = "".join(c for c in name.lower() if c.isalnum())
    for row in read_preset("gpus", "unsupported", tuple[UnsupportedCard, ...], "cards"):
        if any(re.fullmatch("|".join(row.names), form) for form in (wanted, name.lower())):
            return row
    return None


def other_card(name: str) -> OtherCard | None:
    """Return the facts about a card without a preset, by the card's name; None if unknown."""
    wanted = bare_name(split_size(name)[0])
    card, laptop = _LAPTOP.subn("", wanted)
    for capability, cards in (_table().laptops if laptop else _table().cards).items():
        for known, gigabytes in cards.items():
            if bare_name(known) in (card, f"rtx{card}", f"gtx{card}"):
                major, minor = map(int, capability.split("."))
                return OtherCard(wanted, bool(laptop), known, (major, minor), gigabytes)
    return None


def slow_card(name: str) -> SlowCards | None:
    """Return the facts about the speed of a card without tensor cores; None for another card."""
    slow = _table().slow
    return slow if re.fullmatch(slow.cards, _LAPTOP.sub("", bare_name(name))) else None


def mig_slice(key: str, profile: str) -> tuple[int, int]:
    """Return the bytes that CUDA can allocate in a MIG slice, and its SMs.

    Raises:
        UsageError: no such profile of the card is known.
    """
    whole, known = load_preset(key), dict[str, tuple[int, int]]()
    for row in _table().mig:
        known |= row.profiles if key in row.cards else {}
    if profile.lower() not in known:
        part = f"; {key}:total=NGiB is any part of the card, with the whole card's speed"
        hint = f"known are {', '.join(known)}{part}" if known else _cards_with(profile)
        raise UsageError(f"{key} has no MIG profile {profile} that is known", hint=hint)
    size, sms = known[profile.lower()]
    return min(size * MIB, whole.total - whole.reserved), sms


def _cards_with(profile: str) -> str:
    """Return the cards that have this MIG profile, as SPECs."""
    rows = [row for row in _table().mig if profile.lower() in row.profiles]
    return (
        " or ".join(f"{row.cards[0]}:mig={profile.lower()}" for row in rows) or "CARD:mig=3g.40gb"
    )


def is_vgpu(name: str) -> bool:
    """Return whether a name is of a vGPU profile, such as GRID V100D-32C."""
    return bool(_VGPU.fullmatch(name.replace("_", " "))) and not find_preset(name)


def least_usable(gigabytes: float) -> int:
    """Return the least bytes that CUDA can allocate on a card of ``gigabytes`` nominal GB."""
    return int(gigabytes * _LEAST_OF_NOMINAL * 1024) * MIB


def no_preset(name: str) -> UsageError:
    """Return the error for a name without a preset; the error's hint says how to name the card."""
    name = name[:60]
    row = unsupported_card(name)
    if row is not None:
        return UsageError(f"{name} is {row.card}: {row.why}", hint=row.instead)
    if profile := MIG_NAME.fullmatch(name):
        return UsageError(
            f"{name} is a MIG slice of an unnamed card", hint=_cards_with(profile["profile"])
        )
    if is_vgpu(name):
        return UsageError(
            f"{name} is a vGPU profile: a part of a card's memory and time",
            hint="write the card, and the memory that CUDA has in the guest, as in a40:total=42GiB;"
            " the plan has the whole card's speed; A and B profiles have no CUDA",
        )
    return _other(name) or _refitted(name) or _unknown(name)


def _other(name: str) -> UsageError | None:
    """Return the error for a card of known memory and compute capability, or of a laptop."""
    other = other_card(name)
    if other is not None:
        written = [
            f"{other.name}:total={least_usable(gb) // MIB}MiB ({gb} GB)" for gb in other.sizes
        ]
        kind = f"a laptop's card, not the desktop's {other.known}" if other.laptop else "a card"
        return UsageError(
            f"{name} was read as {kind}: only its memory and compute capability are known",
            hint=f"{' or '.join(written)} is the least memory that CUDA gives programs on this"
            " card",
        )
    if _LAPTOP.search(bare_name(name)):
        return UsageError(
            f"{name} is a laptop's card, not the desktop card of the same number",
            hint=f"write the memory that CUDA can hand out: {bare_name(name)}:total=NGiB",
        )
    return None


def _refitted(name: str) -> UsageError | None:
    """Return the error for a known card with a size that no card of this name has."""
    bare, gigabytes = split_size(name)
    key = find_preset(bare)
    if key is None or not gigabytes:
        return None
    return UsageError(
        f"{name}: {key} has {nominal_gigabytes(key)} GB, and none with {gigabytes} GB is known",
        hint=f"{key}:total={least_usable(gigabytes) // MIB}MiB has this memory, and {key}'s speed",
    )


def _unknown(name: str) -> UsageError:
    """Return the error for an unknown name, with the nearest known names."""
    near = [f"{key} ({nominal_gigabytes(key)} GB)" for key in nearest_names(name)]
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return UsageError(
        f"no GPU preset is called {name!r}",
        hint=f"{guess}Write its free memory as NAME:free=19GiB, a card without a preset as"
        " NAME:total=24GiB or 24GB, two as 2xNAME;"
        f" `turbofit gpus` lists {len(preset_names())} presets",
    )


@cache
def _table() -> _Unlisted:
    return read_preset("gpus", "unlisted", _Unlisted)
