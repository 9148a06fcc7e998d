"""The cards of a row, by their names as people write them: so many as the engine uses, empty."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from bench.accuracy.models import MissingError
from bench.accuracy.rows import Row
from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.units import MIB
from turbofit.machine.presets import fill, find_preset, load_preset
from turbofit.machine.spec import parse_spec

__all__ = ["machine_of", "names_one_card"]

#: Figures that do not depend on the card.
_CARDLESS: Final = frozenset({"weights_gb", "files_gb", "llm_gb", "vision_gb", "block_mib"})
#: Names that leave the memory of a card open, and the card of those that only one memory has.
_OPEN: Final = {"a100": None, "v100": None, "a800": None, "h100": "h100", "h800": "h100"}
#: Common cards, smallest first: one of them where a figure's card is not named.
_COMMON: Final = ("rtx3090", "v100-32g", "a100-40g", "a100-80g")
_MEMORY: Final = re.compile(r"(\d+) ?G(?:i?B)?\b", re.IGNORECASE)


def machine_of(row: Row, assumed: list[str]) -> Machine:
    """The row's machine; what the row does not say is added to ``assumed``.

    Raises:
        MissingError: nothing says which card it was, or how much memory it had.
    """
    if "vGPU" in row.gpu and row.total_mib:
        assumed.append("a part of an A100-80G, with its context")
        return parse_spec(f"{row.tp}xa100-80g:total={row.total_mib}MiB")
    key = next(filter(None, (_named(row, name) for name in _spellings(row.gpu))), None)
    if key is None:
        key = _one_of(row, assumed)
    if key is None and not row.total_mib:
        size = re.match(r"(\d+) ?GB (?:gpu|card)\b", row.gpu, re.IGNORECASE)
        if size is not None:
            return _unknown_card(row, int(size[1]) * 1024, assumed)
        key = _implied(row, assumed)
    if key is not None:
        return parse_spec(f"{row.tp}x{key}")
    return _unknown_card(row, row.total_mib or 0, assumed)


def names_one_card(row: Row) -> bool:
    """Whether the row says which card it was, and not one of several."""
    return bool(row.gpu) and (any(map(find_preset, _spellings(row.gpu))) or not _one_of(row, []))


def _spellings(name: str) -> Iterator[str]:
    """The name, then without what stands behind it, then without its brand."""
    plain = re.sub(r"\s*(\(.*\)|x\d+|\d+ ?GB?)$", "", name).strip()
    yield from (name, plain, plain.replace("Tesla ", ""))


def _named(row: Row, name: str) -> str | None:
    """The preset of a card's name, of the row's memory where several cards have that name."""
    key = find_preset(name) if name else None
    if key is None:
        return None
    if row.total_mib:
        return find_preset(f"{name} {round(row.total_mib / 1024)}GB") or key
    if name.strip().lower() in _OPEN:
        key = _OPEN[name.strip().lower()]
        if key is None:
            raise MissingError(f"the memory of the card ({row.gpu})")
    return key


def _one_of(row: Row, assumed: list[str]) -> str | None:
    """The first card in brackets that has the memory before them: "80 GB card (A100 or H100)"."""
    before, bracket, inside = row.gpu.partition("(")
    memory = _MEMORY.search(before)
    if not bracket or memory is None:
        return None
    for name in re.split(r"\bor\b|[,;/)]", inside):
        key = find_preset(f"{name.strip()} {memory[1]}GB") if name.strip() else None
        if key is not None:
            assumed.append(f"{load_preset(key).name}, the first that the row names")
            return key
    return None


def _implied(row: Row, assumed: list[str]) -> str:
    """The smallest common card that holds the figure, where no card is named."""
    used = _largest_used(row)
    if not row.gpu and row.figures and used is None and _CARDLESS.issuperset(row.figures):
        assumed.append("any card: its weights are compared alone")
        return _COMMON[-1]
    if row.gpu or used is None:
        raise MissingError(f"the card ({row.gpu})" if row.gpu else "the card")
    for card in _COMMON:
        if used * MIB < load_preset(card).total - load_preset(card).reserved:
            assumed.append(f"a card of the class of {card}, the smallest that holds the figure")
            return card
    raise MissingError("the card")


def _largest_used(row: Row) -> float | None:
    mib = row.figures.get("used_mib")
    if mib is not None:
        return max(mib) if isinstance(mib, list) else mib
    gigabytes = row.figures.get("used_gb")
    return gigabytes * 1024 if isinstance(gigabytes, (int, float)) else None


def _unknown_card(row: Row, total_mib: int, assumed: list[str]) -> Machine:
    """A card that no preset knows, by its memory alone."""
    assumed.append(f"{row.gpu}: no preset, context at its upper end")
    total = total_mib * MIB
    gpus = tuple(
        fill(
            Gpu(
                index=i,
                uuid=f"GPU-{i}",
                name=row.gpu,
                total=total,
                reserved=0,
                used=0,
                free=total,
            )
        )
        for i in range(row.tp)
    )
    links = tuple(Link(a=a, b=b) for b in range(row.tp) for a in range(b))
    return Machine(
        name=row.gpu, source="preset", gpus=gpus, links=links, visible=tuple(range(row.tp))
    )
