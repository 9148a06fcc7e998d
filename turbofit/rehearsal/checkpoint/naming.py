"""Lists the names, types and shapes of the tensors in a model's checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Final, NamedTuple

from msgspec import field

from turbofit.core.errors import UsageError
from turbofit.core.model import Model, Quantization, TextDims
from turbofit.core.presets import converted, load_yaml, merged, preset_path, presets_of
from turbofit.core.struct import JsonObject, Struct, to_builtins
from turbofit.model.parameters import is_packed
from turbofit.model.tensors import Tensor
from turbofit.rehearsal.checkpoint.tokenizer import Tokenizer

Values = Mapping[str, Any]
_ROOM: Final = "checkpoints"
_DROP: Final = object()
#: The name, safetensors type and shape of a tensor.
Entry = tuple[str, str, tuple[int, ...]]
_GROUP: Final = 128
#: The parts of a tower's layer that Intern-S1-Pro's fp8 checkpoint keeps in 16 bits.
_FP8_KEPT: Final = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
#: The number of weights that share an exponent in mxfp4, or a scale in compressed-tensors.
_MX_GROUP: Final = 32
#: A word before a name in `presets/checkpoints` says that the tensor is no module's weight. The
#: value is the type of the tensor; an empty type is the model's own.
_ALONE: Final = {"bare": "", "float32": "F32"}


class Decoder(Struct, forbid_unknown_fields=True):
    """The place of the decoder in the checkpoint of a whole model.

    Names of the decoder's tensors begin with ``model``; the name of the output head begins with
    ``head``. ``config`` and ``quantized`` are dotted keys of ``config.json``: the first has the
    decoder's settings, the second has the quantization.
    """

    model: str = "model."
    head: str = ""
    config: str = ""
    quantized: str = ""


class Kind(Struct, forbid_unknown_fields=True):
    """A file of `presets/checkpoints`, completed by its ``base``; docs/adding.md has the keys."""

    source: str
    architectures: tuple[str, ...] = field(name="for", default=())
    base: str | None = None
    names: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    tower: dict[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None
    at: str = ""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    video_processor: str = ""
    tokenizer: Tokenizer = Tokenizer()


@cache
def kinds() -> dict[str, Kind]:
    """Return the kind of checkpoint of each architecture.

    Raises:
        UsageError: a file of `presets/checkpoints` is damaged.
    """
    by_architecture: dict[str, Kind] = {}
    for name in sorted(presets_of(_ROOM)):
        kind = converted(_with_base(name), Kind, preset_path(_ROOM, name))
        by_architecture |= dict.fromkeys(kind.architectures, kind)
    return by_architecture


@cache
def _with_base(name: str) -> JsonObject:
    """Return a file's fields, joined with those of its base."""
    data = load_yaml(preset_path(_ROOM, name))
    data |= {key: _split_roles(data[key]) for key in ("tensors", "tower") if key in data}
    return merged({**_with_base(data["base"]), "for": []}, data) if "base" in data else data


def _split_roles(names: JsonObject) -> JsonObject:
    """Split keys that list several roles: ``q, k, v: attn.qkv`` becomes three entries."""
    return {
        role: _split_roles(name) if isinstance(name, dict) else name
        for roles, name in names.items()
        for role in roles.split(", ")
    }


def values_of(model: Model, ids: Mapping[str, int]) -> Values:
    """Return the values of a model that expressions in `presets/checkpoints` may name.

    A prefix says where a value comes from: ``v_`` the vision tower, ``a_`` the audio tower, ``r_``
    the image rule. ``ids`` has the ids of special tokens, by token.
    """
    text, rule = model.text, model.image_rule
    limit = (rule.checkpoint_limit if rule is not None else None) or 0
    values: dict[str, Any] = to_builtins(text)
    values |= {
        "dtype": "float16" if model.dtype == "float16" else "bfloat16",
        "max_tiles": limit or 12,
        "max_patches": limit // rule.unit_side**2 if rule is not None else 0,
        "layers_that_slide": [
            ("sliding", "full")[i % 2] + "_attention" for i in range(text.layers)
        ],
        "ones_of_a_head": [1.0] * (text.head_dim // 2),
        # Time, height and width each rotate a part of half a head's channels.
        "mrope": [text.head_dim // 8, text.head_dim * 3 // 16, text.head_dim * 3 // 16],
    }
    values |= {f"r_{name}": value for name, value in to_builtins(rule).items()} if rule else {}
    values |= _of_attention(text)
    values |= _of_experts(text) | _of_towers(model)
    return values | {f"id:{token}": number for token, number in ids.items()}


def _of_attention(text: TextDims) -> dict[str, Any]:
    """Return the values that describe latent attention and gated delta nets."""
    values: dict[str, Any] = {}
    if text.mla is not None:
        values |= to_builtins(text.mla)
        values["ones_of_a_rope"] = [1.0] * (text.mla.rope_dim // 2)
    if text.delta is not None:
        values |= to_builtins(text.delta)
        interval = text.layers // text.attention_layers
        values["interval"] = interval
        values["layers_of_delta_nets"] = [
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(text.layers)
        ]
    return values | {"layers": text.layers}  # `text.delta` has a field `layers` of its own


def _of_experts(text: TextDims) -> dict[str, Any]:
    """Return the values that describe experts; empty for a model without experts."""
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
        "scoring": "sigmoid" if moe.correction else "softmax",
        "topk_method": "noaux_tc" if moe.correction else "greedy",
    }


def _of_towers(model: Model) -> dict[str, Any]:
    """Return the values that describe the vision and audio towers; empty without towers."""
    vision = model.vision
    if vision is None:
        return {}
    image, steps = vision.image_size or 448, vision.deepstack + 1
    side = image // vision.patch_size
    values = {f"v_{name}": value for name, value in to_builtins(vision).items()}
    values |= {
        "v_image": image,
        "v_patch": vision.patch_size,
        "v_side": side,
        "v_output": vision.outputs * vision.hidden,
        "v_positions": side**2,
        "v_tile_tokens": (side // 2) ** 2,
        "layers_of_deepstack": [i * vision.layers // steps for i in range(1, steps)],
        "kept_at_16_bits": [
            *(
                f"model.visual.blocks.{i}.{part}"
                for i in range(vision.layers)
                for part in _FP8_KEPT
            ),
            *(f"model.language_model.layers.{i}.mlp.gate" for i in range(model.text.layers)),
        ],
    }
    audio = vision.audio
    if audio is not None:
        values |= {f"a_{name}": value for name, value in to_builtins(audio).items()}
    return values


def size(expression: str, values: Values) -> int:
    """Compute a sum of products of names and numbers, such as ``heads*head_dim+2``.

    Raises:
        UsageError: the model has no value of this name.
    """
    total = 0
    for term in expression.split("+"):
        product = 1
        for factor in term.split("*"):
            if not factor.isdigit() and factor not in values:
                raise UsageError(
                    f"a config of presets/checkpoints names {factor}, a value that this model does"
                    " not have",
                    hint="docs/adding.md lists the names of all values",
                )
            product *= int(factor) if factor.isdigit() else values[factor]
        total += product
    return total


def config_from(template: Any, values: Values) -> Any:
    """Make a config from a template, in which text such as ``=NAME`` stands for a value.

    NAME may also be a sum of products. If the value is 0, ``=NAME|null`` becomes null, and
    ``=NAME|drop`` omits the key. ``=|drop`` always omits the key.
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


def _value(name: str, values: Values) -> Any:
    """Return the value of a name or of a sum of products."""
    return values[name] if name in values else size(name, values)


class Writer(NamedTuple):
    """Yields the name, type and shape of each tensor of a checkpoint."""

    tensors: Mapping[str, Tensor]
    dtype: str
    quantization: Quantization | None

    def entries(
        self, names: JsonObject, prefix: str = "", layer: int | None = None
    ) -> Iterator[Entry]:
        """Yield the tensors that ``names`` lists by role.

        ``prefix`` is the beginning of all yielded names. With ``layer``, only tensors of this layer
        are yielded.
        """
        for name, joined in self._joined(names, layer).items():
            if isinstance(joined, list):
                yield from self._stored(prefix, name, joined)
            elif layer is not None:
                yield from self._experts(joined, prefix + joined["at"], layer)
            else:
                yield from self._layers(joined, prefix + joined["at"])

    def _joined(self, names: JsonObject, layer: int | None) -> dict[str, Any]:
        """Return the model's tensors by their name in the checkpoint, and inner blocks by role.

        Several tensors have the same name if the checkpoint joins them into one tensor.
        """
        found: dict[str, Any] = {}
        for role, name in names.items():
            tensor = self.tensors.get(names.get("of", "") + role)
            if isinstance(name, dict):
                found[role] = name
            elif tensor is not None and (layer is None or layer in (tensor.layers or ())):
                found.setdefault(name, []).append(tensor)
        return found

    def _layers(self, names: JsonObject, prefix: str) -> Iterator[Entry]:
        """Yield the tensors of a block for each layer, or once if the block has no layers."""
        groups = [one for one in self._joined(names, None).values() if isinstance(one, list)]
        last = [tensor.layers[-1] for group in groups for tensor in group if tensor.layers]
        if not last:
            yield from self.entries(names, prefix)
        for i in range(max(last, default=-1) + 1):
            yield from self.entries(names, f"{prefix}{i}.", i)

    def _experts(self, names: JsonObject, prefix: str, layer: int) -> Iterator[Entry]:
        """Yield a layer's experts: each with its own tensors, or all stacked in two tensors."""
        tensors = [one for group in self._joined(names, layer).values() for one in group]
        packing, stacked = self.quantization, names.get("stacked")
        if stacked and (packing is None or packing.method == "mxfp4"):
            for name, split in (("gate_up_proj", "columns"), ("down_proj", "rows")):
                joined = [tensor for tensor in tensors if tensor.split == split]
                if joined:
                    yield from self._stacked(prefix + name, joined, outputs=stacked == "outputs")
        else:
            for i in range(tensors[0].copies if tensors else 0):
                yield from self.entries(names, f"{prefix}{i}.", layer)

    def _stacked(self, name: str, joined: list[Tensor], *, outputs: bool) -> Iterator[Entry]:
        """Yield one tensor for all experts of a layer, and their scales and bias if any."""
        (outs, ins), experts = _shape(joined), joined[0].copies
        if self.quantization is not None:
            groups = ins // _MX_GROUP
            yield f"{name}_blocks", "U8", (experts, outs, groups, _MX_GROUP // 2)
            yield f"{name}_scales", "U8", (experts, outs, groups)
        else:
            yield name, self.dtype, (experts, outs, ins) if outputs else (experts, ins, outs)
        if joined[0].bias:
            yield f"{name}_bias", self.dtype, (experts, outs)

    def _stored(self, prefix: str, name: str, joined: list[Tensor]) -> Iterator[Entry]:
        """Yield the tensors under one name: the weight and bias of a module, or a single tensor."""
        how, _, alone = name.rpartition(" ")
        shape, full = _shape(joined), prefix + alone
        if how:
            yield full, _ALONE[how] or self.dtype, shape
            return
        packed = is_packed(joined[0], self.quantization) and not _exempt(full, self.quantization)
        method = self.quantization.method if packed and self.quantization else ""
        yield from _LINEARS[method](full, shape, self.dtype)
        if joined[0].bias:
            yield f"{full}.bias", self.dtype, shape[:1]


def need_names(names: JsonObject, tensors: Iterable[str]) -> None:
    """Check that a file of `presets/checkpoints` has a name for the role of each tensor.

    ``names`` is the file's mapping from roles to names; ``tensors`` has the roles.

    Raises:
        UsageError: a role has no name.
    """
    unnamed = [role for role in tensors if role not in set(_roles(names))]
    if unnamed:
        raise UsageError(
            f"a file of presets/checkpoints has no name for {', '.join(unnamed)}",
            hint="docs/adding.md shows how such a file lists names",
        )


def _roles(names: JsonObject) -> Iterator[str]:
    """Yield all roles that have a name, also the roles of inner blocks."""
    for role, name in names.items():
        if isinstance(name, dict):
            yield from _roles(name)
        yield names.get("of", "") + role


def _shape(joined: list[Tensor]) -> tuple[int, ...]:
    """Return the shape of tensors that are joined along their first dimension."""
    return (sum(tensor.shape[0] for tensor in joined), *joined[0].shape[1:])


def _exempt(name: str, quantization: Quantization | None) -> bool:
    """Return whether the checkpoint leaves a decoder's linear layer in 16 bits."""
    match = re.search(r"layers\.(\d+)\.(.+)", name)
    if quantization is None or not quantization.unconverted or match is None:
        return False
    return quantization.exempts(match[2], int(match[1]))


def _plain(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[Entry]:
    """Yield the tensor of a norm, or of a linear layer that is not packed."""
    yield f"{name}.weight", dtype, shape


def _awq(name: str, shape: tuple[int, ...], _: str) -> Iterator[Entry]:
    """Yield the tensors of a linear layer that AWQ packs to 4 bits."""
    outs, ins = shape
    yield f"{name}.qweight", "I32", (ins, outs // 8)
    yield f"{name}.qzeros", "I32", (ins // _GROUP, outs // 8)
    yield f"{name}.scales", "F16", (ins // _GROUP, outs)


def _fp8(name: str, shape: tuple[int, ...], _: str) -> Iterator[Entry]:
    """Yield the tensors of a linear layer in fp8, with a scale for each block of 128 x 128."""
    outs, ins = shape
    yield f"{name}.weight", "F8_E4M3", shape
    yield f"{name}.weight_scale_inv", "BF16", (-(-outs // _GROUP), -(-ins // _GROUP))


def _int4(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[Entry]:
    """Yield the tensors of a linear layer that compressed-tensors packs to 4 bits."""
    outs, ins = shape
    yield f"{name}.weight_packed", "I32", (outs, ins // 8)
    yield f"{name}.weight_scale", dtype, (outs, ins // _MX_GROUP)
    yield f"{name}.weight_shape", "I32", (2,)


#: Functions that yield a linear layer's tensors, by the method that packs it.
_LINEARS: Final = {"": _plain, "awq": _awq, "fp8": _fp8, "compressed-tensors": _int4}
