"""What TurboMind's weights hold beyond their elements, and what preparing them still holds.

Each tensor begins on 512 bytes, which norms, biases and odd vocabularies leave partly empty. A plan
can take that for a page; a replay to the byte cannot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.units import HALF, round_up
from turbofit.memory.turbomind.weights import (
    ffn_width,
    kv_heads_held,
    lm_head_rows,
    vision_mlp_width,
    vision_side,
    vision_tp,
    weight_classes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.model import Model, TextDims, VisionDims
    from turbofit.core.plan import Settings
    from turbofit.memory.turbomind.weights import EngineConstants

_UNIT: Final = 512

#: elements of a 16-bit tensor, and how many such there are
_Tensors = tuple[int, int]


def weights_held(model: Model, tp: int, constants: EngineConstants) -> int:
    """Bytes alive in the weights' pool of one rank."""
    small = list(_text(model.text, tp))
    if model.vision is not None:
        small += _vision(model.vision, tp, constants)
        small += _projector(model.vision, model.text.hidden, tp)
    padding = sum((-size * HALF % _UNIT) * count for size, count in small)
    return sum(weight_classes(model, tp, constants).values()) + padding


def temporaries(model: Model, settings: Settings, constants: EngineConstants) -> int:
    """Bytes of the last cast or repack, which the pool still holds when free memory is read."""
    text, tp = model.text, settings.tp
    sizes = [0]
    if settings.dtype != model.dtype:
        sizes.append(lm_head_rows(text, tp) * text.hidden * HALF // tp)
    if model.quantization is not None:
        width = ffn_width(text.intermediate, tp, model.quantization, constants)
        sizes.append(text.hidden * 2 * width // tp * HALF)
    return round_up(max(sizes), _UNIT)


def _text(text: TextDims, tp: int) -> Iterator[_Tensors]:
    yield text.hidden, 2 * text.layers + 1
    yield text.vocab * text.hidden // tp, 1
    yield lm_head_rows(text, tp) * text.hidden // tp, 1
    if text.qk_norm:
        yield text.head_dim, 2 * text.layers
    if text.qkv_bias:
        heads = text.heads + 2 * kv_heads_held(text.kv_heads, tp)
        yield heads * text.head_dim // tp, text.layers
    if text.output_bias:
        yield text.hidden, text.layers


def _vision(vision: VisionDims, tp: int, constants: EngineConstants) -> Iterator[_Tensors]:
    hidden, layers, ranks = vision.hidden, vision.layers, vision_tp(vision, tp)
    head_dim = constants.vision_head_dims.get(vision.head_dim, vision.head_dim)
    norms = 4 if vision.norm == "layer_norm" else 2
    scales = 2 if vision.kind == "internvit" else 0  # layer scales
    yield hidden, (norms + scales + 2) * layers  # and the biases of both outputs
    yield vision_mlp_width(vision, tp) // tp, (2 if vision.gated_mlp else 1) * layers
    if vision.qkv_bias:
        yield 3 * vision.heads * head_dim // ranks, layers
    if vision.qk_norm:
        yield hidden // ranks, 2 * layers
    if vision.kind == "internvit":
        yield hidden, 2  # CLS token, bias of the patches
        yield (vision_side(vision) ** 2 + 1) * hidden, 1


def _projector(vision: VisionDims, hidden: int, tp: int) -> Iterator[_Tensors]:
    merged = vision.hidden * vision.merge**2
    inner = hidden if vision.kind == "internvit" else merged
    yield (merged, 2) if vision.kind == "internvit" else (vision.hidden, 1)
    yield inner // tp, 1
    yield hidden, 1
