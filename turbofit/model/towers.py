"""Parameters of vision towers and their projectors, one closed formula a kind.

Counts are of the checkpoint as stored. LMDeploy's PyTorch engine builds the same tensors, down to
the layers after the feature layer, which it never runs; where it builds more, the kind says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from turbofit.core.model import AudioDims, VisionDims


def vision_parameters(vision: VisionDims, text_hidden: int) -> int:
    """Parameters of the tower and the projector into ``text_hidden`` channels."""
    return _KINDS[vision.kind](vision, text_hidden)


def audio_parameters(audio: AudioDims, text_hidden: int) -> int:
    """Parameters of an audio tower: convolutions, layers, a norm, and what is behind it."""
    hidden, inter, channels = audio.hidden, audio.intermediate, audio.channels
    block = 4 * _dense(hidden, hidden) + _dense(hidden, inter) + _dense(inter, hidden) + 4 * hidden
    behind = 2 * hidden + _dense(hidden, text_hidden)
    if not channels:  # and embeddings that stand around a sound
        convolutions = _dense(3 * audio.mel_bins, hidden) + _dense(3 * hidden, hidden)
        return convolutions + audio.layers * (block - hidden) + behind + 2 * text_hidden
    convolutions = 9 * channels * (1 + 2 * channels) + 3 * channels
    convolutions += channels * audio.shrunk_bins * hidden
    return convolutions + audio.layers * block + behind + _dense(hidden, hidden)


def _dense(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _norm(vision: VisionDims) -> int:
    return vision.hidden * (2 if vision.norm == "layer_norm" else 1)


def _patch(vision: VisionDims) -> int:
    return vision.hidden * vision.channels * vision.temporal_patch * vision.patch_size**2


def _tokens(vision: VisionDims) -> int:
    """Patches of one tile."""
    return ((vision.image_size or 0) // vision.patch_size) ** 2


def _block(vision: VisionDims) -> int:
    """One layer: attention with a biased output, an MLP with biases, two norms."""
    hidden, inter = vision.hidden, vision.intermediate
    attention = 4 * hidden * hidden + hidden + (3 * hidden if vision.qkv_bias else 0)
    attention += 2 * hidden if vision.qk_norm else 0
    up = 2 if vision.gated_mlp else 1
    mlp = (up + 1) * hidden * inter + up * inter + hidden
    return 2 * _norm(vision) + attention + mlp


def _internvit(vision: VisionDims, text_hidden: int) -> int:
    hidden, merged = vision.hidden, vision.hidden * vision.merge**2
    embeddings = _patch(vision) + hidden + hidden + (_tokens(vision) + 1) * hidden
    projector = 2 * merged + _dense(merged, text_hidden) + _dense(text_hidden, text_hidden)
    return embeddings + vision.layers * (_block(vision) + 2 * hidden) + projector


def _qwen_vit(vision: VisionDims, text_hidden: int) -> int:
    merged = vision.hidden * vision.merge**2
    projector = _norm(vision) + _dense(merged, merged) + _dense(merged, text_hidden)
    return _patch(vision) + vision.layers * _block(vision) + projector


def _qwen3_vit(vision: VisionDims, text_hidden: int) -> int:
    """Each merger has a norm of its own; those of the deepstack norm whole windows."""
    hidden, merged = vision.hidden, vision.hidden * vision.merge**2
    mlp = _dense(merged, merged) + _dense(merged, text_hidden)
    mergers = 2 * hidden + mlp + vision.deepstack * (2 * merged + mlp)
    embeddings = _patch(vision) + hidden + _tokens(vision) * hidden
    return embeddings + vision.layers * _block(vision) + mergers


def _glm4v(vision: VisionDims, text_hidden: int) -> int:
    """Linear layers without biases; windows are joined by a convolution, then a gated MLP.

    LMDeploy builds a bias behind each attention besides, ``hidden`` elements a layer (36,864
    in GLM-4.1V-9B), which no checkpoint fills.
    """
    hidden, inter = vision.hidden, vision.intermediate
    attention = 4 * hidden * hidden + (3 * hidden if vision.qkv_bias else 0)
    layers = vision.layers * (2 * hidden + attention + 3 * hidden * inter) + 2 * hidden
    embeddings = _patch(vision) + hidden + _tokens(vision) * hidden
    window = _dense(hidden * vision.merge**2, text_hidden)
    gated = text_hidden * text_hidden + 2 * text_hidden + 3 * text_hidden * vision.projector
    return embeddings + layers + window + gated


def _llava_projector(vision: VisionDims, text_hidden: int) -> int:
    """Two linear layers, and the row that ends a line."""
    inputs = vision.hidden * vision.outputs
    newline = text_hidden if vision.newline else 0
    return _dense(inputs, text_hidden) + _dense(text_hidden, text_hidden) + newline


def _clip_tower(vision: VisionDims) -> int:
    """A class token and a norm before the layers; the norm after them is for it alone."""
    hidden = vision.hidden
    embeddings = _patch(vision) + hidden + (_tokens(vision) + 1) * hidden
    return embeddings + vision.layers * _block(vision) + 2 * _norm(vision)


def _clip(vision: VisionDims, text_hidden: int) -> int:
    return _clip_tower(vision) + _llava_projector(vision, text_hidden)


def _phi3v(vision: VisionDims, text_hidden: int) -> int:
    """Two separators of a window's channels, and two linear layers."""
    merged = vision.hidden * vision.merge**2
    projector = _dense(merged, text_hidden) + _dense(text_hidden, text_hidden)
    return _clip_tower(vision) + 2 * merged + projector


def _siglip_tower(vision: VisionDims) -> int:
    hidden = vision.hidden
    embeddings = _patch(vision) + hidden + _tokens(vision) * hidden
    return embeddings + vision.layers * _block(vision) + _norm(vision)


def _siglip(vision: VisionDims, text_hidden: int) -> int:
    return _siglip_tower(vision) + _llava_projector(vision, text_hidden)


def _gemma3(vision: VisionDims, text_hidden: int) -> int:
    """One matrix, and a norm without biases before it."""
    return _siglip_tower(vision) + vision.hidden * text_hidden + vision.hidden


def _eva_clip(vision: VisionDims, text_hidden: int) -> int:
    """A convolution joins windows where there are any, then a gated MLP, then two tokens around.

    GLM-4V's convolution goes to the language model's channels, CogVLM2's stays in the tower's.
    """
    hidden = vision.hidden
    embeddings = _patch(vision) + hidden + hidden + (_tokens(vision) + 1) * hidden
    inner = text_hidden if vision.kind == "eva_clip_glm" else hidden
    window = _dense(hidden * vision.merge**2, inner) if vision.merge > 1 else 0
    gated = inner * text_hidden + 2 * text_hidden + 3 * text_hidden * vision.projector
    return embeddings + vision.layers * _block(vision) + window + gated + 2 * text_hidden


def _mllama(vision: VisionDims, text_hidden: int) -> int:
    """Two stacks of layers; embeddings by tile and shape, each with a gate."""
    hidden, positions = vision.hidden, _tokens(vision) + 1
    shapes = (vision.shapes + 1) * vision.max_tiles * hidden
    embeddings = _patch(vision) + hidden + positions * hidden + shapes * positions + 1
    embeddings += 2 * (shapes + 1)
    block = _block(vision) - hidden
    layers = vision.layers * block + vision.extra_layers * (block + 2) + 2 * _norm(vision)
    return embeddings + layers + _dense(hidden * vision.outputs, text_hidden)


def _llama4(vision: VisionDims, text_hidden: int) -> int:
    """Norms before and after the layers; an adapter of windows, then a matrix, without biases."""
    hidden, adapter = vision.hidden, vision.projector
    embeddings = _patch(vision) + hidden + (_tokens(vision) + 1) * hidden + 2 * _norm(vision)
    projector = adapter * (vision.hidden * vision.merge**2 + adapter + text_hidden)
    return embeddings + vision.layers * _block(vision) + projector


def _idefics3(vision: VisionDims, text_hidden: int) -> int:
    """A square of merge x merge patches becomes one token by one matrix without biases."""
    return _siglip_tower(vision) + vision.hidden * vision.merge**2 * text_hidden


def _moonvit(vision: VisionDims, text_hidden: int) -> int:
    """A norm of single patches before two linear layers of whole windows."""
    merged = vision.hidden * vision.merge**2
    projector = _norm(vision) + _dense(merged, merged) + _dense(merged, text_hidden)
    return _siglip_tower(vision) + projector


_KINDS: Final[dict[str, Callable[[VisionDims, int], int]]] = {
    "internvit": _internvit,
    "qwen2vit": _qwen_vit,
    "qwen2_5vit": _qwen_vit,
    "qwen3vit": _qwen3_vit,
    "glm4v": _glm4v,
    "clip": _clip,
    "phi3v": _phi3v,
    "siglip": _siglip,
    "gemma3": _gemma3,
    "eva_clip": _eva_clip,
    "eva_clip_glm": _eva_clip,
    "mllama": _mllama,
    "llama4": _llama4,
    "idefics3": _idefics3,
    "moonvit": _moonvit,
}
