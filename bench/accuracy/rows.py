"""Rows of public measurements: facts, each with its source, in `rows.jsonl`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Machine
from turbofit.core.model import Model, ModelSource, Quantization
from turbofit.core.presets import load_yaml
from turbofit.core.struct import Struct
from turbofit.machine.spec import parse_spec
from turbofit.model.parameters import parameters, stored_bytes
from turbofit.model.presets import Preset, find_preset, preset_model

HERE: Final = Path(__file__).parent
_PACKED: Final = {
    "awq": Quantization(method="awq", bits=4, group_size=128),
    "gptq": Quantization(method="gptq", bits=4, group_size=128),
    "fp8": Quantization(method="fp8", bits=8, group_size=128),
}


class Row(Struct):
    """One measurement: the run, its machine and the observed figures.

    ``model`` is a preset or a model of `models.yaml`; ``packed`` is its quantisation if the name
    does not say it. ``on`` is the machine as a SPEC. ``free_mib`` was free when the cache was
    sized, if a log says so. ``figures`` have the names of `score.py`, and end in their units; a
    reporter's GB is read as GiB. ``outcome`` is ``ran``, ``oom``, ``other`` (failed, but not for
    memory) or "". ``assumed`` is what the source does not say, ``missing`` what it lacks for a
    forecast, ``not_empty`` what else was on the machine. An unknown card's outcome is not judged.
    """

    id: str
    source: str
    date: str = ""
    engine: str = ""
    version: str = ""
    model: str = ""
    packed: str = ""
    gpu: str = ""
    on: str = ""
    card_known: bool = True
    tp: int = 1
    quant_policy: int = 0
    settings: dict[str, float] = msgspec.field(default_factory=dict)
    images: int | None = None
    tiles: int | None = None
    size: tuple[int, int] | None = None
    free_mib: float | None = None
    not_empty: str = ""
    assumed: tuple[str, ...] = ()
    missing: str = ""
    figures: dict[str, float | list[float]] = msgspec.field(default_factory=dict)
    outcome: str = ""
    phase: str = ""


def read_rows() -> list[Row]:
    """Read all rows."""
    lines = (HERE / "rows.jsonl").read_text().splitlines()
    return [msgspec.json.decode(line, type=Row) for line in lines]


def machine_of(row: Row) -> Machine:
    """Return the row's machine, with nothing in use on its cards."""
    return parse_spec(row.on)


def model_of(row: Row) -> Model:
    """Return the model of a row, quantised if the row says so but its name does not."""
    model = _known(row.model)
    if not row.packed:
        return model
    packed = _PACKED[row.packed]
    dtype = model.dtype if packed.method == "fp8" else "float16"
    size = stored_bytes(model.text, model.vision, dtype, packed)
    return replace(model, quantization=packed, dtype=dtype, weight_bytes=size)


@cache
def _known(name: str) -> Model:
    preset = find_preset(name)
    if preset is not None:
        try:
            return preset_model(preset)
        except TurbofitError:  # turbofit refuses it; an older LMDeploy ran it
            pass
    return _listed(load_yaml(HERE / "models.yaml")[name])


def _listed(data: dict[str, Any]) -> Model:
    preset = msgspec.convert({key: data[key] for key in data if key != "aliases"}, Preset)
    if preset.base is not None:
        return replace(preset_model(preset.base), name=preset.name, hub_id=preset.hub_id)
    assert preset.text is not None
    assert preset.dtype is not None
    assert preset.architecture is not None
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
