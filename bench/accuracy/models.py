"""The model of a row, by its name as people write it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from bench.accuracy.rows import Row
from turbofit.core.errors import TurbofitError
from turbofit.core.model import Model, ModelSource, Quantization
from turbofit.core.presets import load_yaml
from turbofit.model.parameters import parameters, stored_bytes
from turbofit.model.presets import Preset, preset_model
from turbofit.model.presets import find_preset as find_model

__all__ = ["MissingError", "model_of"]

HERE = Path(__file__).parent
_PACKED: Final = {
    "awq": Quantization(method="awq", bits=4, group_size=128),
    "gptq": Quantization(method="gptq", bits=4, group_size=128),
    "fp8": Quantization(method="fp8", bits=8, group_size=128),
}
#: What a name says of how the same model is stored: formats, bits, Transformers' own classes.
_STORED: Final = re.compile(
    r"[-_ ](awq|gptq|fp8|w4a16|w8a8|(?:4|8)-?bit|int(?:4|8)|bf16|fp16|hf)$", re.IGNORECASE
)


class MissingError(Exception):
    """An input that a row lacks, in a few words."""


def model_of(row: Row) -> Model:
    """The model of a row, packed where the row says so and the name does not.

    Raises:
        MissingError: no name, or a name whose dimensions nobody wrote down here.
    """
    if not row.model:
        raise MissingError("the model")
    model = next(filter(None, map(_known, _names(row.model))), None)
    if model is None:
        raise MissingError(f"the model's dims ({row.model})")
    packed = next((_PACKED[one] for one in row.quant.split("+") if one in _PACKED), None)
    if model.quantization is None and packed is not None:
        dtype = model.dtype if packed.method == "fp8" else "float16"
        size = stored_bytes(model.text, model.vision, dtype, packed)
        model = replace(model, quantization=packed, dtype=dtype, weight_bytes=size)
    return model


def _names(name: str) -> Iterator[str]:
    """The name, then without its owner, then without each word of how it is stored."""
    yield name
    short = name.rpartition("/")[2]
    while True:
        yield short
        plain = _STORED.sub("", short)
        if plain == short:
            return
        short = plain


def _known(name: str) -> Model | None:
    """A preset, else one of `models.yaml`."""
    preset = find_model(name)
    if preset is not None:
        try:
            return preset_model(preset)
        except TurbofitError:
            pass
    listed = _listed().get(_plain(name))
    return None if listed is None else _from_preset(listed)


@cache
def _listed() -> dict[str, Preset]:
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
