"""What a forward of Transformers' model code holds besides weights and cache: upper bounds.

Each bound follows the tensors that the code keeps alive at its fullest moment, and was compared
with rehearsals of the real code on pretend GPUs (docs/fallback.md): none was under. They hold for
``sdpa`` with a kernel that does not write the attention matrix, which is asked for always; where a
card has no such kernel for grouped heads, the matrix is charged.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.model import Model, TextDims
from turbofit.memory.transformers.components import cross_tokens
from turbofit.memory.transformers.layout import Layout

__all__ = ["embedding_bytes", "prefill_bytes", "sampling_bytes", "vision_bytes"]

#: Towers whose attention rotates nothing; the others do it in 32 bits.
_UNROTATED: Final = frozenset({"internvit", "clip", "siglip", "mllama", "idefics3"})
#: Towers that are given which pixels are an image's.
_PIXEL_MASKS: Final = frozenset({"idefics3"})
#: Channels a token of a vision block's attention, in units of its width: residual, norm, queries,
#: keys, values, output; with their rotation. Rehearsed with Qwen2-VL: 17.6.
_VISION_PLAIN: Final = 10
_VISION_ROTATED: Final = 20
#: The same beside its MLP. Rehearsed with SigLIP: 2.5.
_VISION_BESIDE_MLP: Final = 4
#: The projector, in units of the language model's width.
_PROJECTOR: Final = 4
_FLOAT: Final = 4
#: Channels a token beside the MLP: the prompt's embeddings, the layer's input, the residual, the
#: norm, and rotary tables. Rehearsed with Qwen2, Llama and Mistral: 4.0 to 4.3.
_BESIDE_MLP: Final = 5
#: Queries and keys before and after rotation, with their temporaries.
_ROTATED: Final = 4
#: Embeddings, their copy with the images' features in place, the features, the mask, and the sum
#: over it in 64 bits that finds each feature's place.
_SCATTER: Final = 12
#: Bytes of one element of the attention matrix: three copies in 32 bits.
_MATRIX: Final = 12
#: Copies of a mask over all pairs of positions in a tower; and of prompt and image in a decoder,
#: rehearsed with Llama-3.2-Vision: 2.1.
_TOWER_MASKS: Final = 4
_CROSS_MASKS: Final = 3
#: Bytes of a pair of positions while the mask of a sliding window is made: three booleans.
#: Rehearsed with Mistral and Qwen2-MoE, with Transformers 5.17: 3.0.
_MASK_MADE: Final = 3
#: Copies of that mask in attention as numbers: torch's memory-efficient kernel takes no booleans,
#: and where the length is no multiple of 16 a longer copy. Rehearsed with Mistral: 2, else 1.
_MASK_NUMBERS: Final = 2
#: Classes that make the mask whether or not a layer has a window.
_ALWAYS_MASKED: Final = frozenset({"Qwen2MoeForCausalLM"})
#: Bytes a word of the vocabulary: logits, their 32-bit copy, sorted values and indices, sums.
_SAMPLING: Final = 64


def vision_bytes(model: Model, layout: Layout, units: int, width: int) -> int:
    """Bytes that the vision tower and its projector hold for so many units (tiles or patches).

    Args:
        model: what is served.
        layout: of its class.
        units: of one request, all images together.
        width: bytes of an element.
    """
    vision, rule = model.vision, model.image_rule
    if vision is None or rule is None or not units:
        return 0
    tokens, pixels = _tower(model, units)
    mlp = (3 if vision.gated_mlp else 2) * vision.intermediate
    attention = _VISION_PLAIN if vision.kind in _UNROTATED else _VISION_ROTATED
    channels = max(
        attention * vision.hidden,
        mlp + _VISION_BESIDE_MLP * vision.hidden,
        int(_PROJECTOR * (1 / rule.unit_step) * model.text.hidden),
    )
    if layout.keeps_states:
        channels += (vision.layers + 1) * vision.hidden
    # Pixels arrive in 32 bits and are cast.
    return pixels * (_FLOAT + width) + tokens * channels * width + _mask_bytes(model, units, width)


def _mask_bytes(model: Model, units: int, width: int) -> int:
    """Bytes of a tower's masks.

    Idefics3's are of pixels, with a copy, both in 32 bits; and of all pairs of a tile's patches, as
    booleans and as numbers. The latter is Over: nothing of a tile is masked, so a real card makes
    none of them.
    """
    if cross_tokens(model):
        return _TOWER_MASKS * width * _tower(model, units)[0] ** 2
    vision, rule = model.vision, model.image_rule
    if vision is None or rule is None or vision.kind not in _PIXEL_MASKS:
        return 0
    return units * (2 * _FLOAT * rule.unit_side**2 + model.unit_tower_tokens**2 * (1 + width))


def _tower(model: Model, units: int) -> tuple[int, int]:
    """Tokens within the tower for so many units, and the values of their pixels."""
    return units * model.unit_tower_tokens, units * model.unit_values


def prefill_bytes(
    model: Model, tokens: int, images: int, units: int, width: int, *, writes_matrix: bool
) -> int:
    """Bytes that one decoder layer and what is kept around it hold for a prompt.

    Args:
        model: what is served.
        tokens: of the prompt, images' tokens included.
        images: of the request.
        units: of the request, where this device holds the tower too: its pixels, what the tower
            made of them and their features stay until the end of the prefill.
        width: bytes of an element.
        writes_matrix: whether attention writes the matrix of all pairs of tokens.
    """
    text = model.text
    held = tokens * _BESIDE_MLP * text.hidden * width + _layer_bytes(text, tokens, width)
    if images:
        # Qwen3-VL's tower hands features to several layers, and all wait for theirs.
        held += tokens * text.hidden * (1 + getattr(model.vision, "deepstack", 0)) * width
    if model.vision is not None:
        made, pixels = _tower(model, units)
        held += pixels * _FLOAT + made * model.vision.hidden * width
    if writes_matrix:
        held += _MATRIX * text.heads * tokens**2
    return held + _CROSS_MASKS * width * tokens * cross_tokens(model) * images


def _layer_bytes(text: TextDims, tokens: int, width: int) -> int:
    """Bytes inside one layer, with the mask of all pairs that a sliding window needs.

    Transformers makes it from as many tokens on as the window has, once, for all layers; torch
    makes numbers of it in each attention. Over: on the devices behind the first none is made.
    """
    attention = tokens * _ROTATED * (text.heads + text.kv_heads) * text.head_dim * width
    mlp = tokens * _mlp_channels(text) * width
    windowed = 0 < text.window <= tokens
    if not windowed and text.architecture not in _ALWAYS_MASKED:
        return max(mlp, attention)
    pairs = tokens**2
    numbers = _MASK_NUMBERS * width * pairs if windowed else 0
    return max(_MASK_MADE * pairs, mlp + pairs, attention + pairs + numbers)


def embedding_bytes(model: Model, tokens: int, images: int, width: int) -> int:
    """Bytes of putting the images' features among the embeddings; 0 without images."""
    if not images or model.image_rule is None:
        return 0
    return _SCATTER * tokens * model.text.hidden * width


def sampling_bytes(model: Model) -> int:
    """Bytes of choosing one token out of the vocabulary."""
    return _SAMPLING * model.text.vocab


def _mlp_channels(text: TextDims) -> int:
    """Channels a token inside the MLP: gate, up and their product; with experts, of all chosen.

    The experts' inputs and outputs are copied for each that is chosen. Rehearsed with Mixtral and
    Qwen3-MoE: 2.4 hidden widths for each chosen, and 3.4 once.
    """
    dense = 3 * text.intermediate
    if text.moe is None:
        return dense
    moe = text.moe
    chosen = moe.experts_per_token * (6 * moe.intermediate + 5 * text.hidden) // 2
    return max(dense, chosen + 4 * text.hidden + 3 * moe.shared_intermediate)
