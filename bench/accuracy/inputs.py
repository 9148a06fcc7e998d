"""What a row has to say before a forecast is possible: model, card, version, settings."""

from __future__ import annotations

import re
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from bench.accuracy.rows import Row
from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.model import Model, ModelSource, Quantization
from turbofit.core.presets import load_yaml
from turbofit.core.struct import Struct
from turbofit.core.units import MIB
from turbofit.machine.presets import fill, find_preset, load_preset
from turbofit.machine.spec import parse_spec
from turbofit.memory.legacy.generations import release_on
from turbofit.model.parameters import parameters, stored_bytes
from turbofit.model.presets import Preset, preset_model
from turbofit.model.presets import find_preset as find_model

__all__ = ["Inputs", "MissingError", "inputs_of"]

HERE = Path(__file__).parent
_AWQ = Quantization(method="awq", bits=4, group_size=128)
#: Figures that do not depend on the card.
_CARDLESS = frozenset({"weights_gb", "files_gb", "llm_gb", "vision_gb", "block_mib"})
#: Before it the cache counts sessions: a share of memory has no meaning.
_FIRST_RATIO = "0.1.0"
#: Names that leave the memory of a card open.
_OPEN = {"a100", "v100", "h100", "h800", "a800"}
#: Common cards, smallest first: one of them where a figure's card is not named.
_COMMON = ("rtx3090", "a100-40g", "a100-80g")


class MissingError(Exception):
    """An input that a row lacks, in a few words."""


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
    model = _model(row)
    machine = _machine(row, assumed)
    return Inputs(
        row=row,
        version=version,
        model=model,
        machine=machine,
        quant_policy=_quant_policy(row.quant),
        not_empty=entry.get("not_empty", ""),
        card_known=bool(row.gpu),
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


def _model(row: Row) -> Model:
    """The model by name, packed where the row says so and the name does not."""
    name = row.model
    if not name:
        raise MissingError("the model")
    plain = re.sub(r"[-_](awq|4bit|int4|w4a16)$", "", name, flags=re.IGNORECASE)
    model = _known(name) or _known(plain)
    if model is None:
        raise MissingError(f"the model's dims ({name})")
    if model.quantization is None and "awq" in row.quant:
        size = stored_bytes(model.text, model.vision, "float16", _AWQ)
        model = replace(model, quantization=_AWQ, dtype="float16", weight_bytes=size)
    return model


def _quant_policy(quant: str) -> int:
    match = re.search(r"kv([48])", quant)
    return int(match[1]) if match else 0


def _known(name: str) -> Model | None:
    """A preset, else one of `models.yaml`."""
    short = name.rpartition("/")[2]
    for candidate in (name, short):
        preset = find_model(candidate)
        if preset is not None:
            try:
                return preset_model(preset)
            except TurbofitError:
                break
    own = _own_models().get(_plain(short))
    return None if own is None else _from_preset(own)


@cache
def _own_models() -> dict[str, Preset]:
    table = {}
    for key, data in load_yaml(HERE / "models.yaml").items():
        aliases = data.pop("aliases", [])
        preset = msgspec.convert(data, Preset)
        for name in (key, preset.name, preset.hub_id, *aliases):
            table[_plain(name.rpartition("/")[2])] = preset
    return table


def _from_preset(preset: Preset) -> Model:
    if preset.base is not None:
        return replace(preset_model(preset.base), name=preset.name, hub_id=preset.hub_id)
    if preset.text is None or preset.dtype is None or preset.architecture is None:
        raise MissingError(f"dims of {preset.name} in models.yaml")
    return Model(
        name=preset.name,
        architecture=preset.architecture,
        parameters=parameters(preset.text, preset.vision),
        weight_bytes=stored_bytes(preset.text, preset.vision, preset.dtype, preset.quantization),
        dtype=preset.dtype,
        text=preset.text,
        vision=preset.vision,
        image_rule=preset.image_rule,
        quantization=preset.quantization,
        hub_id=preset.hub_id,
        source=ModelSource(kind="preset", where=preset.name, sizes="formula"),
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s._-]+", "-", name.strip().lower()).strip("-")


def _machine(row: Row, assumed: list[str]) -> Machine:
    """So many of the row's card as the engine uses, empty."""
    name = re.sub(r"\s*(\(.*\)|x\d+|\d+ ?GB?)$", "", row.gpu).strip()
    if "vGPU" in row.gpu and row.total_mib:
        assumed.append("a part of an A100-80G, with its context")
        return parse_spec(f"{row.tp}xa100-80g:total={row.total_mib}MiB")
    key = None
    for candidate in (row.gpu, name, name.replace("Tesla ", "")):
        if candidate and find_preset(candidate):
            key = candidate
            break
    plain = _plain(key or name)
    if key and plain in _OPEN and not row.total_mib:
        key = _open_card(row, plain)
    if key is None and not row.total_mib:
        key = _implied(row, assumed)
    if key is not None:
        spec = find_preset(key) or key
        return parse_spec(f"{row.tp}x{spec}")
    return _unknown_card(row, assumed)


def _open_card(row: Row, name: str) -> str:
    """A name that several memories have: the one of its 80 GB class where only that is common."""
    if name in ("h100", "h800"):
        return "h100"
    raise MissingError(f"the memory of the card ({row.gpu})")


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


def _unknown_card(row: Row, assumed: list[str]) -> Machine:
    """A card that no preset knows, by its memory alone."""
    assumed.append(f"{row.gpu}: no preset, context at its upper end")
    total = (row.total_mib or 0) * MIB
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
