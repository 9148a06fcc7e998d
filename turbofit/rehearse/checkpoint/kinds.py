"""A model's configs and tensors from the rows of `presets/checkpoints`; see `docs/adding.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from typing import Any, Final

from msgspec import field

from turbofit.core.errors import UsageError
from turbofit.core.json_types import JsonObject
from turbofit.core.model import Model, Quantization, TextDims
from turbofit.core.presets import converted, load_yaml, merged, preset_path, presets_of
from turbofit.core.struct import Struct, to_builtins
from turbofit.rehearse.checkpoint.tokenizer import Tokenizer

_DTYPE: Final = {"bfloat16": "BF16", "float16": "F16"}
Values = Mapping[str, Any]
#: Name, safetensors type and shape of a tensor.
Entry = tuple[str, str, tuple[int, ...]]
_ROOM: Final = "checkpoints"
_GROUP: Final = 128
#: Weights that share an exponent in mxfp4, and a scale in compressed-tensors.
_MX_GROUP: Final = 32


class Decoder(Struct, forbid_unknown_fields=True):
    """Where a model has its decoder: prefixes of its tensors and of its head; keys in the config.

    ``quantized``: in which part of the config the packing is told.
    """

    model: str = "model."
    head: str = ""
    config: str = ""
    quantized: str = ""


class Kind(Struct, forbid_unknown_fields=True):
    """One file, its base filled in; docs/adding.md says what each key is."""

    source: str
    architectures: tuple[str, ...] = field(name="for", default=())
    base: str | None = None
    names: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[Any] = field(default_factory=list)
    parts: dict[str, list[Any]] = field(default_factory=dict)
    decoder: Decoder | None = None
    decoder_parts: dict[str, list[Any]] = field(default_factory=dict)
    decoder_rows: list[Any] = field(default_factory=list)
    at: str = ""
    more_rows: list[Any] = field(default_factory=list)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    video_processor: str = ""
    tokenizer: Tokenizer = Tokenizer()


@cache
def kinds() -> dict[str, Kind]:
    """All kinds, by the architectures that they stand for; UsageError: a file is damaged."""
    by_architecture: dict[str, Kind] = {}
    for name in sorted(presets_of(_ROOM)):
        kind = converted(_whole(name), Kind, preset_path(_ROOM, name))
        by_architecture |= dict.fromkeys(kind.architectures, kind)
    return by_architecture


@cache
def _whole(name: str) -> JsonObject:
    """A file with its base's fields."""
    data = load_yaml(preset_path(_ROOM, name))
    return merged({**_whole(data["base"]), "for": []}, data) if "base" in data else data


# ------------------------------------------------------------------------------- named values


def values_of(model: Model, packing: str, ids: Mapping[str, int]) -> Values:
    """What expressions may name of a model.

    ``v_`` begins what is the tower's, ``a_`` the audio tower's, ``r_`` the image rule's.
    """
    text, rule = model.text, model.image_rule
    limit = (rule.checkpoint_limit if rule is not None else None) or 0
    values: dict[str, Any] = to_builtins(text)
    values |= {
        "architecture": model.architecture,
        "dtype": "float16" if model.dtype == "float16" else "bfloat16",
        "packed": bool(packing),
        "quantization": model.quantization,
        "max_tiles": limit or 12,
        "max_patches": limit // rule.unit_side**2 if rule is not None else 0,
        "layers_that_slide": [
            ("sliding", "full")[i % 2] + "_attention" for i in range(text.layers)
        ],
        "ones_of_a_head": [1.0] * (text.head_dim // 2),
        # Of half a head's channels time, height and width each turn a part.
        "mrope": [text.head_dim // 8, text.head_dim * 3 // 16, text.head_dim * 3 // 16],
    }
    for part in (text.mla, text.delta):
        values |= to_builtins(part) if part is not None else {}
    values["layers"] = text.layers  # a delta net counts layers, too
    values |= {f"r_{name}": value for name, value in to_builtins(rule).items()} if rule else {}
    if text.mla is not None:
        values["ones_of_a_rope"] = [1.0] * (text.mla.rope_dim // 2)
    if text.delta is not None:
        interval = text.layers // text.attention_layers
        values["interval"] = interval
        values["layers_of_delta_nets"] = [
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(text.layers)
        ]
    values |= _of_experts(text) | _of_towers(model)
    return values | {f"id:{token}": number for token, number in ids.items()}


def _of_experts(text: TextDims) -> dict[str, Any]:
    moe = text.moe
    if moe is None:
        return {}
    return {
        "experts": moe.experts,
        "experts_per_token": moe.experts_per_token,
        "expert_intermediate": moe.intermediate,
        "dense_layers": text.layers - moe.layers,
        "shared_intermediate": moe.shared_intermediate,
        "shared_experts": moe.shared_intermediate // moe.intermediate,
        "correction": moe.correction,
        "scoring": "sigmoid" if moe.correction else "softmax",
        "topk_method": "noaux_tc" if moe.correction else "greedy",
    }


def _of_towers(model: Model) -> dict[str, Any]:
    vision = model.vision
    if vision is None:
        return {}
    image, steps = vision.image_size or 448, vision.deepstack + 1
    side = image // vision.patch_size
    values = {f"v_{name}": value for name, value in to_builtins(vision).items()}
    values |= {
        "v_image": image,
        "v_patch": vision.patch_size,
        "v_layer_norm": vision.norm == "layer_norm",
        "v_side": side,
        "v_output": vision.outputs * vision.hidden,
        "v_positions": side**2,
        "v_tile_tokens": (side // 2) ** 2,
        "layers_of_deepstack": [i * vision.layers // steps for i in range(1, steps)],
        "kept_at_16_bits": _kept_at_16_bits(vision.layers, model.text.layers),
    }
    audio = vision.audio
    if audio is not None:
        values |= {f"a_{name}": value for name, value in to_builtins(audio).items()}
        values["a_shrunk_bins"] = audio.shrunk_bins
    return values


def _kept_at_16_bits(tower: int, layers: int) -> list[str]:
    parts = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    names = [f"model.visual.blocks.{i}.{part}" for i in range(tower) for part in parts]
    return [*names, *(f"model.language_model.layers.{i}.mlp.gate" for i in range(layers))]


def size(expression: str, values: Values) -> int:
    """A sum of products of named values and figures, such as ``heads*head_dim+2``."""
    total = 0
    for term in expression.split("+"):
        factors = (
            int(factor) if factor.isdigit() else _named(factor, values)
            for factor in term.split("*")
        )
        total += prod(factors)
    return total


def _named(name: str, values: Values) -> Any:
    if name not in values:
        raise UsageError(
            f"a row of presets/checkpoints names {name}, which this model has not",
            hint="docs/adding.md says which names there are",
        )
    return values[name]


def config_from(template: Any, values: Values) -> Any:
    """A config of its template: ``=NAME`` is a value, ``=NAME|null`` null where that is 0.

    A sum of products may stand in the place of a name.
    ``=NAME|drop`` leaves the key out where it is 0, and ``=|drop`` always.
    """
    if isinstance(template, dict):
        config = {key: config_from(value, values) for key, value in template.items()}
        return {key: value for key, value in config.items() if value is not _DROP}
    if isinstance(template, list):
        return [config_from(value, values) for value in template]
    if not isinstance(template, str) or not template.startswith("="):
        return template
    name, _, otherwise = template[1:].rpartition("|")
    if otherwise not in ("null", "drop"):
        return _value(template[1:], values)
    value = _value(name, values) if name else None
    return value or (_DROP if otherwise == "drop" else None)


_DROP: Final = object()


def _value(name: str, values: Values) -> Any:
    """A named value, or the sum of products that an expression means."""
    return values[name] if name in values else size(name, values)


# ------------------------------------------------------------------------ how linears are stored


def _plain(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[Entry]:
    """A norm, or a linear layer as it is computed."""
    yield f"{name}.weight", dtype, shape


def _awq(name: str, shape: tuple[int, ...], _: str) -> Iterator[Entry]:
    outs, ins = shape
    yield f"{name}.qweight", "I32", (ins, outs // 8)
    yield f"{name}.qzeros", "I32", (ins // _GROUP, outs // 8)
    yield f"{name}.scales", "F16", (ins // _GROUP, outs)


def _fp8(name: str, shape: tuple[int, ...], _: str) -> Iterator[Entry]:
    outs, ins = shape
    yield f"{name}.weight", "F8_E4M3", shape
    yield f"{name}.weight_scale_inv", "BF16", (-(-outs // _GROUP), -(-ins // _GROUP))


def _int4(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[Entry]:
    """The tensors of compressed-tensors, which packs experts alone here."""
    if ".experts." not in name:
        yield from _plain(name, shape, dtype)
        return
    outs, ins = shape
    yield f"{name}.weight_packed", "I32", (outs, ins // 8)
    yield f"{name}.weight_scale", dtype, (outs, ins // _MX_GROUP)
    yield f"{name}.weight_shape", "I32", (2,)


#: Of mxfp4 the experts alone are packed.
_LINEARS: Final = {
    "": _plain, "awq": _awq, "fp8": _fp8, "mxfp4": _plain, "compressed-tensors": _int4,
}  # fmt: skip


def _stacked(name: str, shape: tuple[int, ...], dtype: str, packing: str) -> Iterator[Entry]:
    """All experts of a layer in one tensor, with biases: experts, outputs, inputs (gpt-oss)."""
    experts, outs, ins = shape
    if packing == "mxfp4":
        groups = ins // _MX_GROUP
        yield f"{name}_blocks", "U8", (experts, outs, groups, _MX_GROUP // 2)
        yield f"{name}_scales", "U8", (experts, outs, groups)
    else:
        yield name, dtype, (experts, ins, outs)
    yield f"{name}_bias", dtype, (experts, outs)


# ---------------------------------------------------------------------------------------- rows


def rows_of(
    rows: list[Any], parts: Mapping[str, list[Any]], values: Values, packing: str
) -> Iterator[Entry]:
    """The tensors of a list of rows: strings, or blocks with rows of their own.

    ``packing``: how linear layers are stored; empty for 16 bits.
    """

    def entries(rows: list[Any], at: str, layer: int) -> Iterator[Entry]:
        for row in rows:
            if isinstance(row, str):
                yield from _row(at, row.split(), values, packing)
            elif "part" in row:
                yield from entries(parts[row["part"]], at, layer)
            elif _wanted(row, values):
                yield from block(row, at, layer)

    def block(row: Mapping[str, Any], at: str, layer: int) -> Iterator[Entry]:
        """Layers of which some have the rows, or experts."""
        selector = next(key for key in row if key in {*_SELECTORS, *_REPEATED, *_LISTED})
        if selector in _LISTED:
            if (layer in _named(row[selector], values)) == _LISTED[selector]:
                yield from entries(row["rows"], at, layer)
            return
        count = size(str(row[selector]), values)
        if selector in _REPEATED:
            for i in range(count):
                inner = i if selector == "all" else layer
                yield from entries(row["rows"], f"{at}{row['at']}{i}.", inner)
        elif _SELECTORS[selector](layer, count):
            yield from entries(row["rows"], at, layer)

    return entries(rows, "", 0)


def _row(at: str, words: list[str], values: Values, packing: str) -> Iterator[Entry]:
    how, name, *rest = words
    sizes = [word for word in rest if ":" not in word and word != "bias"]
    options = dict(word.split(":", 1) for word in rest if ":" in word)
    if not _wanted(options, values):
        return
    bias = bool(_named(options["bias"], values)) if "bias" in options else "bias" in rest
    shape = tuple(size(expression, values) for expression in sizes)
    full, dtype = at + name, _DTYPE[values["dtype"]]
    if how == "tensor":
        yield full, options.get("as", dtype), shape
    elif how == "stack":
        yield from _stacked(full, shape, dtype, packing)
    else:
        packed = how == "linear" and not _exempt(full, values["quantization"])
        stored = _LINEARS[packing] if packed else _plain
        yield from stored(full, shape, dtype)
        if bias:
            yield f"{full}.bias", dtype, shape[:1]


def _exempt(name: str, quantization: Quantization | None) -> bool:
    """Whether the checkpoint leaves a decoder's linear layer in 16 bits."""
    match = re.search(r"layers\.(\d+)\.(.+)", name)
    if quantization is None or not quantization.unconverted or match is None:
        return False
    return quantization.exempts(match[2], int(match[1]))


def _wanted(options: Mapping[str, Any], values: Values) -> bool:
    wanted, unwanted = options.get("if"), options.get("unless")
    if wanted is not None and not _named(wanted, values):
        return False
    return unwanted is None or not _named(unwanted, values)


#: Which layers have a block's rows, by the block's first key.
_SELECTORS: Final = {
    "first": lambda layer, count: layer < count,
    "from": lambda layer, count: layer >= count,
    "every": lambda layer, count: (layer + 1) % count == 0,
    "but every": lambda layer, count: (layer + 1) % count != 0,
}
#: The same by a list of layers: those in it, or the others.
_LISTED: Final = {"in": True, "not in": False}
_REPEATED: Final = ("all", "experts")
