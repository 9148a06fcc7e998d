"""Lists the tensors of vision towers, projectors and audio towers; each kind has a function.

The tensors are as stored in the checkpoint. LMDeploy's PyTorch engine builds the same tensors, also
those of layers after the feature layer, which never run. Where the engine builds more, the
docstring of the kind says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Final

from msgspec.structs import replace

from turbofit.core.model import AudioDims, VisionDims
from turbofit.model.tensors import New, Tensor

Tensors = list[Tensor]


def tower_tensors(vision: VisionDims, text_hidden: int) -> tuple[Tensor, ...]:
    """Return the tensors of `vision_tensors`, and of `audio_tensors` if there is an audio tower."""
    tensors = vision_tensors(vision, text_hidden)
    return tensors + audio_tensors(vision.audio, text_hidden) if vision.audio else tensors


@lru_cache
def vision_tensors(vision: VisionDims, text_hidden: int) -> tuple[Tensor, ...]:
    """Return all tensors of a vision tower and of its projector into ``text_hidden`` channels.

    Roles in a second stack of layers begin with ``global.``, roles in further projectors with
    ``deepstack.``.
    """
    tensors = _KINDS[vision.kind](vision, text_hidden)
    return tuple([tensor for tensor in tensors if tensor.layers is None or tensor.layers])


@lru_cache
def audio_tensors(audio: AudioDims, text_hidden: int) -> tuple[Tensor, ...]:
    """Return an audio tower's tensors: convolutions, layers, a norm and the projection.

    The roles of these tensors begin with ``audio.``.
    """
    hidden, channels, whisper = audio.hidden, audio.channels, not audio.channels
    conv = partial(Tensor, part="embedding", bias=True)
    linear = partial(Tensor, part="projector", bias=True)
    if whisper:
        begin = [
            conv(role="conv1", shape=(hidden, audio.mel_bins, 3)),
            conv(role="conv2", shape=(hidden, hidden, 3)),
        ]
        behind = [
            # embeddings that stand before and after a sound
            linear(role="bounds", shape=(2, text_hidden), bias=False),
            linear(role="proj", shape=(text_hidden, hidden)),
        ]
    else:
        begin = [
            conv(role="conv1", shape=(channels, 1, 3, 3)),
            conv(role="conv2", shape=(channels, channels, 3, 3)),
            conv(role="conv3", shape=(channels, channels, 3, 3)),
            # Each convolution halves the mel bins and rounds up.
            conv(role="conv_out", shape=(hidden, channels * -(-audio.mel_bins // 8)), bias=False),
        ]
        behind = [
            linear(role="proj1", shape=(hidden, hidden)),
            linear(role="proj2", shape=(text_hidden, hidden)),
        ]
    layer = partial(Tensor, layers=range(audio.layers), bias=True)
    attention = _attention(partial(layer, part="attention"), hidden)
    if whisper:
        attention = [replace(one, bias=one.role != "k") for one in attention]
    tensors = [
        *begin,
        *attention,
        *_mlp(partial(layer, part="mlp"), hidden, audio.intermediate, "up"),
        *_norms(layer, hidden, "norm1", "norm2"),
        *_norms(conv, hidden, "post_norm"),
        *behind,
    ]
    return tuple([replace(tensor, role=f"audio.{tensor.role}") for tensor in tensors])


def _norms(tensor: New, width: int, *roles: str) -> Tensors:
    return [tensor(role=role, part="norm", shape=(width,)) for role in roles]


def _attention(linear: New, hidden: int) -> Tensors:
    columns, shape = partial(linear, split="columns"), (hidden, hidden)
    inputs = [columns(role=role, shape=shape) for role in ("q", "k", "v")]
    return [*inputs, linear(role="out", shape=shape, split="rows")]


def _mlp(linear: New, hidden: int, inner: int, *columns: str) -> Tensors:
    inputs = [linear(role=role, shape=(inner, hidden), split="columns") for role in columns]
    return [*inputs, linear(role="down", shape=(hidden, inner), split="rows")]


def _layers(vision: VisionDims, count: int, *, biases: bool = True) -> Tensors:
    """List the tensors of ``count`` layers, each with attention, an MLP and two norms.

    ``biases``: whether the MLP and the attention's output projection have biases.
    """
    hidden, layer = vision.hidden, partial(Tensor, layers=range(count))
    *qkv, out = _attention(partial(layer, part="attention", bias=vision.qkv_bias), hidden)
    columns = ("gate", "up") if vision.gated_mlp else ("up",)
    tensors = [
        *qkv,
        replace(out, bias=biases),
        *_mlp(partial(layer, part="mlp", bias=biases), hidden, vision.intermediate, *columns),
        *_norms(partial(layer, bias=_is_biased(vision)), hidden, "norm1", "norm2"),
    ]
    return tensors + _norms(layer, hidden, "q_norm", "k_norm") if vision.qk_norm else tensors


def _is_biased(vision: VisionDims) -> bool:
    """Return whether the tower's norms have biases."""
    return vision.norm == "layer_norm"


def _patches(vision: VisionDims) -> int:
    """Return the number of patches in one tile."""
    return ((vision.image_size or 0) // vision.patch_size) ** 2


def _window_channels(vision: VisionDims) -> int:
    """Return the number of channels in a window of patches."""
    return vision.hidden * vision.merge**2


def _embedding(role: str, *shape: int) -> Tensor:
    return Tensor(role=role, part="embedding", shape=shape)


def _projector(role: str, *shape: int, bias: bool = True) -> Tensor:
    """Make a tensor of the projector: a linear layer (outputs first) or a norm."""
    return Tensor(role=f"projector.{role}", part="projector", shape=shape, bias=bias)


def _patch(vision: VisionDims, *, bias: bool = False) -> Tensor:
    times = (vision.temporal_patch,) if vision.temporal_patch > 1 else ()
    shape = (vision.hidden, vision.channels, *times, vision.patch_size, vision.patch_size)
    return replace(_embedding("patch", *shape), bias=bias)


def _with_token(vision: VisionDims, *axes: int) -> Tensors:
    """List a class token of shape ``axes`` + hidden, and the positions.

    The class token and each patch have a position.
    """
    hidden = vision.hidden
    return [
        _embedding("class", *axes, hidden),
        _embedding("positions", *axes[1:], _patches(vision) + 1, hidden),
    ]


def _clip(vision: VisionDims) -> Tensors:
    """List the tensors of CLIP's tower: a class token, layers, and a norm before and after them.

    The norm after the layers is for the class token only.
    """
    norm = partial(Tensor, bias=_is_biased(vision))
    norms = _norms(norm, vision.hidden, "pre_norm", "post_norm")
    return [_patch(vision), *_with_token(vision), *norms, *_layers(vision, vision.layers)]


def _with_learned_positions(vision: VisionDims) -> Tensors:
    """List the tensors of a tower with a learned position per patch and without a class token."""
    positions = _embedding("positions", _patches(vision), vision.hidden)
    return [_patch(vision, bias=True), positions, *_layers(vision, vision.layers)]


def _siglip(vision: VisionDims) -> Tensors:
    norm = partial(Tensor, bias=_is_biased(vision))
    return _with_learned_positions(vision) + _norms(norm, vision.hidden, "post_norm")


def _two_layers(inputs: int, text_hidden: int) -> Tensors:
    """List a projector of two linear layers."""
    return [_projector("1", text_hidden, inputs), _projector("2", text_hidden, text_hidden)]


def _merger(vision: VisionDims, text_hidden: int, *, bias: bool) -> Tensors:
    """Qwen's merger: a norm of single patches, then two linear layers of whole windows."""
    merged, norm = _window_channels(vision), _projector("norm", vision.hidden, bias=bias)
    return [norm, _projector("1", merged, merged), _projector("2", text_hidden, merged)]


def _gated(inputs: int, text_hidden: int, vision: VisionDims) -> Tensors:
    """List a projector's matrix, a norm, and a gated MLP; only the norm has a bias."""
    plain, width = partial(_projector, bias=False), vision.projector
    return [
        plain("1", text_hidden, inputs),
        _projector("norm", text_hidden),
        plain("gate", width, text_hidden),
        plain("up", width, text_hidden),
        plain("down", text_hidden, width),
    ]


def _internvit(vision: VisionDims, text_hidden: int) -> Tensors:
    """InternViT: two scales in each layer, and a norm of whole windows before the projector."""
    hidden, merged = vision.hidden, _window_channels(vision)
    scales = _norms(partial(Tensor, layers=range(vision.layers)), hidden, "scale1", "scale2")
    tower = [_patch(vision, bias=True), *_with_token(vision, 1, 1)]
    projector = [_projector("norm", merged), *_two_layers(merged, text_hidden)]
    return [*tower, *_layers(vision, vision.layers), *scales, *projector]


def _qwen_vit(vision: VisionDims, text_hidden: int) -> Tensors:
    merger = _merger(vision, text_hidden, bias=_is_biased(vision))
    return [_patch(vision), *_layers(vision, vision.layers), *merger]


def _qwen3_vit(vision: VisionDims, text_hidden: int) -> Tensors:
    """List Qwen3-VL's tensors: each merger has its own norm.

    The norm of a ``deepstack`` merger covers a whole window of patches.
    """
    merger, steps = _merger(vision, text_hidden, bias=True), range(vision.deepstack)
    deep = [_projector("norm", _window_channels(vision)), *merger[1:]]
    deepstack = [replace(one, role=f"deepstack.{one.role}", layers=steps) for one in deep]
    return [*_with_learned_positions(vision), *merger, *deepstack]


def _glm4v(vision: VisionDims, text_hidden: int) -> Tensors:
    """GLM-4.1V: linear layers without biases; a convolution joins windows, then a gated MLP.

    LMDeploy also builds a bias after each attention, ``hidden`` elements a layer (36,864 in
    GLM-4.1V-9B), which no checkpoint contains.
    """
    hidden, plain = vision.hidden, replace(vision, gated_mlp=True, norm="rms_norm")
    return [
        _patch(vision, bias=True),
        _embedding("positions", _patches(vision), hidden),
        *_layers(plain, vision.layers, biases=False),
        *_norms(Tensor, hidden, "pre_norm", "post_norm"),
        _projector("window", text_hidden, hidden, vision.merge, vision.merge),
        *_gated(text_hidden, text_hidden, vision),
    ]


def _llava(vision: VisionDims, text_hidden: int) -> Tensors:
    """LLaVA: CLIP's or SigLIP's tower, two linear layers, and in some an end-of-line embedding."""
    tower = _clip(vision) if vision.kind == "clip" else _siglip(vision)
    newline = [_projector("newline", text_hidden, bias=False)] if vision.newline else []
    return [*tower, *_two_layers(vision.hidden * vision.outputs, text_hidden), *newline]


def _phi3v(vision: VisionDims, text_hidden: int) -> Tensors:
    """Phi-3-vision: CLIP's tower, two separators as wide as a window, and two linear layers."""
    merged = _window_channels(vision)
    separators = [_projector(one, merged, bias=False) for one in ("line_end", "image_end")]
    return [*_clip(vision), *separators, *_two_layers(merged, text_hidden)]


def _gemma3(vision: VisionDims, text_hidden: int) -> Tensors:
    """Gemma 3: SigLIP's tower, a norm without bias, then one matrix."""
    norm, plain = (vision.hidden,), partial(_projector, bias=False)
    return [*_siglip(vision), plain("norm", *norm), plain("1", text_hidden, vision.hidden)]


def _eva_clip(vision: VisionDims, text_hidden: int) -> Tensors:
    """EVA-CLIP: a convolution joins windows (if any), then a gated MLP and two tokens.

    GLM-4V's convolution has the language model's channels, CogVLM2's those of the tower.
    """
    hidden, merge = vision.hidden, vision.merge
    inner = text_hidden if vision.kind == "eva_clip_glm" else hidden
    return [
        _patch(vision, bias=True),
        *_with_token(vision, 1),
        *_layers(vision, vision.layers),
        *([_projector("window", inner, hidden, merge, merge)] if merge > 1 else []),
        *_gated(inner, text_hidden, vision),
        *[_projector(one, 1, 1, text_hidden, bias=False) for one in ("begin", "end")],
    ]


def _mllama(vision: VisionDims, text_hidden: int) -> Tensors:
    """Llama 3.2 Vision: two stacks of layers, and gated embeddings by tile and aspect ratio."""
    hidden, shapes, tile = vision.hidden, vision.shapes + 1, vision.max_tiles * vision.hidden
    plain, again = replace(vision, qkv_bias=False), range(vision.extra_layers)
    second = [
        replace(tensor, role=f"global.{tensor.role}") for tensor in _layers(plain, len(again))
    ]
    gates = _norms(partial(Tensor, layers=again), 1, "global.attention_gate", "global.mlp_gate")
    tensors = [
        *_clip(plain),
        _embedding("positions.gate", 1),
        _embedding("tile_positions", shapes, tile * (_patches(vision) + 1)),
        *[_embedding(f"{place}_tile.gate", 1) for place in ("pre", "post")],
        *[_embedding(f"{place}_tile", shapes, tile) for place in ("pre", "post")],
        *second,
        *gates,
        _projector("1", text_hidden, hidden * vision.outputs),
    ]
    # No projection of attention has a bias, not even that of the output.
    return [
        replace(tensor, bias=False) if tensor.part == "attention" else tensor for tensor in tensors
    ]


def _llama4(vision: VisionDims, text_hidden: int) -> Tensors:
    """Llama 4: CLIP's tower, then three matrices without biases, the first for whole windows."""
    adapter, plain = vision.projector, partial(_projector, bias=False)
    projector = [plain("1", adapter, _window_channels(vision)), plain("2", adapter, adapter)]
    return [*_clip(vision), *projector, plain("3", text_hidden, adapter)]


def _idefics3(vision: VisionDims, text_hidden: int) -> Tensors:
    """Idefics3: SigLIP's tower, and one matrix that turns merge x merge patches into a token."""
    return [*_siglip(vision), _projector("1", text_hidden, _window_channels(vision), bias=False)]


def _moonvit(vision: VisionDims, text_hidden: int) -> Tensors:
    """MoonViT: SigLIP's tower with positions in a square, and Qwen's merger."""
    side = (vision.image_size or 0) // vision.patch_size
    patch, _, *tower = _siglip(vision)
    positions = _embedding("positions", side, side, vision.hidden)
    return [patch, positions, *tower, *_merger(vision, text_hidden, bias=_is_biased(vision))]


_KINDS: Final[dict[str, Callable[[VisionDims, int], Tensors]]] = {
    "internvit": _internvit,
    "qwen2vit": _qwen_vit,
    "qwen2_5vit": _qwen_vit,
    "qwen3vit": _qwen3_vit,
    "glm4v": _glm4v,
    "clip": _llava,
    "phi3v": _phi3v,
    "siglip": _llava,
    "gemma3": _gemma3,
    "eva_clip": _eva_clip,
    "eva_clip_glm": _eva_clip,
    "mllama": _mllama,
    "llama4": _llama4,
    "idefics3": _idefics3,
    "moonvit": _moonvit,
}
