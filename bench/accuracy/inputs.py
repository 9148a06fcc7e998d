"""What a row has to say before a forecast is possible: model, card, version, settings."""

from __future__ import annotations

import re
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bench.accuracy.cards import machine_of, names_one_card
from bench.accuracy.models import MissingError, model_of
from bench.accuracy.rows import Row
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.struct import Struct
from turbofit.memory.engines import without_account
from turbofit.memory.legacy.generations import generation_of, release_on
from turbofit.memory.versions import is_legacy

__all__ = ["Inputs", "MissingError", "inputs_of"]

HERE = Path(__file__).parent
#: Before it the cache counts sessions: a share of memory has no meaning.
_FIRST_RATIO = "0.1.0"


class Inputs(Struct):
    """Everything that a forecast takes; ``assumed`` says what the row itself does not."""

    row: Row
    version: str
    model: Model
    machine: Machine
    quant_policy: int
    not_empty: str
    card_known: bool
    assumed: tuple[str, ...]


def inputs_of(row: Row) -> Inputs:
    """The inputs of a row.

    Raises:
        MissingError: one is lacking, or turbofit has no account for it.
    """
    if row.engine not in ("turbomind", "pytorch"):
        raise MissingError(f"no account of the engine ({row.engine or 'not named'}) is scored here")
    if not row.outcome or (row.outcome == "other" and not row.figures):
        raise MissingError("a figure or an outcome that is about memory")
    entry = next((one for one in _sources() if _applies(one, row)), {})
    settings = {**row.settings, **entry.get("settings", {})}
    row = replace(row, settings=settings)
    assumed: list[str] = []
    version = _version(row, entry, assumed)
    model = model_of(row)
    part = without_account(model, version)
    if part and model.text.delta is None:  # of which the reference's account is scored
        raise MissingError(f"an account of {part} with LMDeploy {version}")
    machine = machine_of(row, assumed)
    return Inputs(
        row=row,
        version=version,
        model=model,
        machine=machine,
        quant_policy=_quant_policy(row, version),
        not_empty=entry.get("not_empty", ""),
        card_known=names_one_card(row),
        assumed=tuple(assumed),
    )


def _applies(entry: dict[str, Any], row: Row) -> bool:
    return entry["source"] in row.source and entry.get("model") in (None, row.model)


@cache
def _sources() -> list[dict[str, Any]]:
    import yaml

    found: list[dict[str, Any]] = yaml.safe_load((HERE / "sources.yaml").read_text())
    return found


def _version(row: Row, entry: dict[str, Any], assumed: list[str]) -> str:
    """The version as stated, else the newest one of the day."""
    if "version" in entry:
        return str(entry["version"])
    if row.version:
        return row.version
    day = re.match(r"(\d{4})(?:-(\d{2}))?(?:-(\d{2}))?", row.date)
    if day is None:
        raise MissingError("the engine's version, or a date")
    newest = release_on(date(int(day[1]), int(day[2] or 12), int(day[3] or 28)))
    if newest is None:
        raise MissingError("the engine's version: the date is before the first release")
    if 0 < row.settings.get("cache_max_entry_count", 1) < 1:
        newest = max(newest, _FIRST_RATIO, key=_numbers)
    assumed.append(f"version {newest} by the date")
    return newest


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _quant_policy(row: Row, version: str) -> int:
    """What the version's TurboMind calls a cache of so many bits."""
    match = re.search(r"kv([48])", row.quant)
    if match is None:
        return 0
    bits = int(match[1])
    named = {bits: bits}
    if row.engine == "turbomind" and is_legacy(version):
        named = {size: policy for policy, size in generation_of(version).cache.bits.items()}
    return named.get(bits, bits)
