"""Model presets: one YAML file for each model, and the names that people type.

Sizes are computed from the dims when they are needed, so sizes and dims of a preset always agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.images import AnyImageRule
from turbofit.core.model import Dtype, Model, ModelSource, Quantization, TextDims, VisionDims
from turbofit.core.presets import is_preset, load_yaml, preset_path, presets_dir, read_preset
from turbofit.core.struct import Struct
from turbofit.model.parameters import parameters, stored_bytes
from turbofit.model.thinking import thinks

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
_ID: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,79}")
#: The number of parameters in a name, such as -7b.
_SIZE: Final = re.compile(r"[-_ :]?\d+(?:\.\d+)?b\b")


class Unsupported(Struct):
    """The reason why turbofit has no account of a model that people ask for by name.

    ``merged`` is the preset of the checkpoint that `turbofit merge` makes of this model, which has
    the same size.
    """

    message: str
    hint: str
    merged: str = ""


class Preset(Struct, forbid_unknown_fields=True):
    """One file of `presets/models/`.

    ``base`` names the preset of the same model in another storage format. ``source`` says where the
    figures were published. ``awq`` is the preset of the published AWQ variant.
    """

    name: str
    hub_id: str
    source: str
    base: str | None = None
    architecture: str | None = None
    dtype: Dtype | None = None
    needs_remote_code: bool | None = None
    text: TextDims | None = None
    vision: VisionDims | None = None
    image_rule: AnyImageRule | None = None
    quantization: Quantization | None = None
    awq: str | None = None
    unsupported: Unsupported | None = None


def find_preset(name: str) -> str | None:
    """Return the preset id for an alias, an id or a hub id; case and dots do not matter."""
    if _ID.fullmatch(name) and name != "aliases" and is_preset("models", name):
        return name  # faster than reading aliases.yaml
    return _aliases().get(_plain(name))


def nearest_names(name: str, count: int = 3) -> list[str]:
    """Return up to ``count`` presets with similar names.

    The names with the longest common start come first.
    """
    from os.path import commonprefix

    from turbofit.core.messages import near

    known, wanted = _aliases(), _plain(name.rpartition("/")[2])
    # Names that the typed one begins with, the longest of them; then similar and longer names.
    begins = [key for key in known if wanted.startswith(key)]
    family = [key for key in known if wanted and key.startswith(wanted)]
    close = [*sorted(begins, key=len)[-1:], *near(wanted, known, count * 9), *family]
    close.sort(key=lambda key: -len(commonprefix([key, wanted])))  # noqa: RUF071 - of letters
    return [*dict.fromkeys(known[key] for key in close)][:count]


def sizes_of(name: str) -> set[str]:
    """Return the sizes of models that a name contains, such as ``7b`` for 7 billion parameters."""
    return {size.lstrip("-_ :") for size in _SIZE.findall(name.rpartition("/")[2].lower())}


@cache
def load_preset(preset_id: str) -> Preset:
    """Read one preset; missing fields come from its base."""
    preset = read_preset("models", preset_id, Preset)
    if preset.base is None:
        return preset
    base = load_preset(preset.base)
    # The AWQ variant of the base is not also a variant of this preset.
    inherited = {
        field: getattr(base, field)
        for field in Preset.__struct_fields__
        if getattr(preset, field) is None and field != "awq"
    }
    return msgspec.structs.replace(preset, **inherited)


def preset_model(preset_id: str, *, warnings: tuple[str, ...] = ()) -> Model:
    """Return the model of a preset.

    Raises:
        UsageError: the preset only says why there is no account, or is incomplete.
    """
    preset = load_preset(preset_id)
    if preset.unsupported is not None:
        raise UsageError(preset.unsupported.message, hint=preset.unsupported.hint)
    text, dtype, architecture = preset.text, preset.dtype, preset.architecture
    if text is None or dtype is None or architecture is None:
        raise UsageError(f"preset {preset_id} is incomplete", hint="reinstall turbofit")
    return Model(
        name=preset.name,
        architecture=architecture,
        parameters=parameters(text, preset.vision),
        weight_bytes=stored_bytes(text, preset.vision, dtype, preset.quantization),
        dtype=dtype,
        text=text,
        vision=preset.vision,
        image_rule=preset.image_rule,
        quantization=preset.quantization,
        needs_remote_code=bool(preset.needs_remote_code),
        hub_id=preset.hub_id,
        thinks=thinks(preset.hub_id or preset.name),
        source=ModelSource(kind="preset", where=preset_id, sizes="formula"),
        warnings=warnings,
    )


def unheeded(revision: str | None) -> tuple[str, ...]:
    """Return the warning that a preset describes another revision than the given one."""
    if revision is None:
        return ()
    return (f"a preset describes the main revision; the revision {revision!r} was not read",)


def four_bits(preset_id: str) -> str | None:
    """Return the preset of the same model in 4 bits, AWQ first, or None."""
    known = load_preset(preset_id)
    if known.awq or known.quantization is not None:
        return known.awq
    return _stored(preset_id, lambda packed: packed.bits == 4)


def _stored(preset_id: str, wanted: Callable[[Quantization], bool]) -> str | None:
    """Return the preset of the same weights in a quantization that ``wanted`` accepts, or None."""
    begin = preset_id.removesuffix("-bf16")  # so that few presets are read
    for candidate in known_presets():
        if candidate.startswith(begin) and candidate != preset_id:
            stored = load_preset(candidate)
            packed = stored.quantization
            if stored.base == preset_id and packed is not None and wanted(packed):
                return candidate
    return None


def four_bit_variant(model: Model) -> Model | None:
    """Return the published 4-bit variant of this model, or None.

    If the model is from a folder, the folder's name identifies the preset.
    """
    return _variant(model, four_bits)


def fp8_variant(model: Model) -> Model | None:
    """Return the published FP8 variant of this model, or None.

    If the model is from a folder, the folder's name identifies the preset.
    """
    return _variant(model, lambda preset: _stored(preset, lambda packed: packed.method == "fp8"))


def lighter_checkpoints(model: Model) -> Iterator[Model]:
    """Yield published checkpoints with fewer bytes of weights than a model, the nearest first.

    First come its own variants in 4 bits and in FP8, then the smaller models of its family in the
    same storage format, the largest first. There are none of a model without a preset.
    """
    yield from filter(None, (four_bit_variant(model), fp8_variant(model)))
    own = _id_of(model)
    if own is None:
        return
    family = _SIZE.sub("", own, count=1)
    kin = [name for name in known_presets() if name != own and _SIZE.sub("", name, 1) == family]
    models = [preset_model(name) for name in kin if load_preset(name).unsupported is None]
    smaller = [one for one in models if one.weight_bytes < model.weight_bytes]
    yield from sorted(smaller, key=lambda one: -one.weight_bytes)


def _variant(model: Model, find: Callable[[str], str | None]) -> Model | None:
    """Return a variant of an unquantised model, or None.

    ``find`` returns the variant's preset for the preset of the model.
    """
    preset_id = None if model.quantization is not None else _id_of(model)
    variant = find(preset_id) if preset_id else None
    return preset_model(variant) if variant else None


def unpacked_variant(model: Model) -> Preset | None:
    """Return the published 16-bit checkpoint of a quantised model, or None."""
    preset = preset_of(model) if model.quantization else None
    base = load_preset(preset.base) if preset is not None and preset.base else preset
    return base if base is not None and base.quantization is None else None


def preset_of(model: Model) -> Preset | None:
    """Return the preset of a checkpoint, or None.

    If the checkpoint is a folder, its name identifies the preset.
    """
    preset_id = _id_of(model)
    return load_preset(preset_id) if preset_id else None


def _id_of(model: Model) -> str | None:
    here = model.source.where if model.source.kind == "preset" else None
    return here or find_preset(model.hub_id or model.name)


def known_presets() -> list[str]:
    """Return the ids of all presets, in the order of aliases.yaml."""
    return list(dict.fromkeys(_aliases().values()))


def presets_with(fragments: Iterable[str]) -> list[str]:
    """Return the ids of the presets with a name that contains all of ``fragments``.

    Raises:
        UsageError: no preset has such a name.
    """
    wanted = [_plain(word) for word in fragments]
    preset_ids = [
        preset_id
        for preset_id, names in load_yaml(preset_path("models", "aliases")).items()
        if any(all(word in _plain(name) for word in wanted) for name in (preset_id, *names))
    ]
    if not preset_ids:
        typed = " ".join(fragments)[:80]
        near = nearest_names(typed)
        raise UsageError(
            f"no preset has {typed!r} in its name",
            hint=f"did you mean {', '.join(near)}?" if near else "`turbofit models` shows all",
        )
    return preset_ids


@cache
def _aliases() -> dict[str, str]:
    """Return the preset id for each normalised id, hub id and alias."""
    table: dict[str, str] = {}
    for preset_id, names in load_yaml(presets_dir() / "models" / "aliases.yaml").items():
        for name in (preset_id, *names):
            table[_plain(name)] = preset_id
            if "/" in name:
                table.setdefault(_plain(name.rpartition("/")[2]), preset_id)
    return table


def _plain(name: str) -> str:
    """Normalise a name: case, dots, underscores, blanks and dashes do not matter."""
    return re.sub(r"[\s._-]+", "", name.lower())
