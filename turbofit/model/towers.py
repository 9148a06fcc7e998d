"""Parameters of vision towers and their projectors, one closed formula a kind.

Counts are of the checkpoint as stored. LMDeploy's PyTorch engine builds the same tensors, down to
the layers after the feature layer, which it never runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from turbofit.core.model import VisionDims

__all__ = ["vision_parameters"]


def vision_parameters(vision: VisionDims, text_hidden: int) -> int:
    """Parameters of the vision tower and the projector into ``text_hidden`` channels."""
    return _KINDS[vision.kind](vision, text_hidden)


def _dense(inputs: int, outputs: int, *, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


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


def _llava_projector(vision: VisionDims, text_hidden: int) -> int:
    """Two linear layers, and the row that ends a line."""
    inputs = vision.hidden * vision.outputs
    newline = text_hidden if vision.newline else 0
    return _dense(inputs, text_hidden) + _dense(text_hidden, text_hidden) + newline


def _clip(vision: VisionDims, text_hidden: int) -> int:
    """A class token and a norm before the layers; the norm after them is for it alone."""
    hidden = vision.hidden
    embeddings = _patch(vision) + hidden + (_tokens(vision) + 1) * hidden
    layers = vision.layers * _block(vision) + 2 * _norm(vision)
    return embeddings + layers + _llava_projector(vision, text_hidden)


def _siglip(vision: VisionDims, text_hidden: int) -> int:
    hidden = vision.hidden
    embeddings = _patch(vision) + hidden + _tokens(vision) * hidden
    layers = vision.layers * _block(vision) + _norm(vision)
    return embeddings + layers + _llava_projector(vision, text_hidden)


_KINDS: Final[dict[str, Callable[[VisionDims, int], int]]] = {
    "internvit": _internvit,
    "qwen2vit": _qwen_vit,
    "qwen2_5vit": _qwen_vit,
    "clip": _clip,
    "siglip": _siglip,
}
