"""Weights on one rank of an older TurboMind, and its vision tower under torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.model import Model, VisionDims
from turbofit.core.units import HALF, round_up
from turbofit.memory.legacy.generations import Generation, LegacyConstants, VisionRule
from turbofit.memory.turbomind.weights import EngineConstants, vision_side, weight_classes
from turbofit.model.towers import vision_parameters

#: Layouts of packed weights that depend on the card came with 0.18: the plain one everywhere.
_PLAIN: Final = (8, 0)


def older_layouts(constants: EngineConstants, generation: Generation) -> EngineConstants:
    """A generation's paddings of feed-forward networks and experts, on every card the same.

    Over at tp 1 since 0.14, where nothing is padded: by less than 32 channels. Hopper's own layout
    of 4 bits is 0.18's: the binary of 0.17.0 has no plan for it.
    """
    align, int4 = generation.ffn_align or 1, constants.packed["int4"]
    plain = replace(int4["90"], group=int4["default"].group, of=None, fused_silu=False, align=None)
    return replace(
        constants,
        packed={**constants.packed, "int4": {**int4, "90": plain}},
        ffn_align_16bit=align,
        ffn_align_grouped=align,
        experts={card: replace(layout, align=align) for card, layout in constants.experts.items()},
    )


def legacy_weight_classes(
    model: Model, tp: int, constants: EngineConstants, generation: Generation
) -> dict[str, int]:
    """Bytes per rank of each tensor class, the vision tower apart.

    Embedding and lm_head were whole on every rank before 0.6, their rows padded to ``tp``.
    """
    older = older_layouts(constants, generation)
    classes = weight_classes(replace(model, vision=None), tp, older, _PLAIN)
    if generation.embeddings == "replicated":
        whole = round_up(model.text.vocab, tp) * model.text.hidden * HALF
        classes |= {"embedding": whole, "lm_head": whole}
    return classes


# A vision tower that torch runs inside the server: float16 weights, and what one image leaves.
#
# LMDeploy 0.2.6 to 0.15 builds the checkpoint's own tower in Python. Torch's caching allocator
# keeps what the largest batch of images needed, for good and outside TurboMind's pool.


def tower_bytes(
    model: Model, tp: int, rule: VisionRule, constants: LegacyConstants
) -> tuple[int, ...]:
    """Bytes of the tower on each GPU of the group, rounded as torch's allocator rounds.

    ``balanced`` spreads whole layers over the group (accelerate's ``device_map="auto"``) with the
    embeddings on the first GPU and the projector on the last.
    """
    vision = model.vision
    if vision is None or rule.runs != "torch":
        return (0,) * tp
    layer = [size * HALF for size in _layer(vision)]
    total = vision_parameters(vision, model.text.hidden) * HALF
    ends = max(0, total - sum(layer) * vision.layers)
    ranks = tp if rule.placed == "balanced" else 1
    shares = [vision.layers // ranks + (i < vision.layers % ranks) for i in range(ranks)]
    sizes = [_held(layer * share, constants) for share in shares]
    sizes[-1] += ends
    return (
        *(round_up(size, constants.torch_block["page"]) for size in sizes),
        *(0,) * (tp - ranks),
    )


def tower_activations(
    vision: VisionDims, units: int, constants: LegacyConstants, *, flash: bool
) -> int:
    """Bytes that the tower's forward of so many units (tiles or patches) holds at its peak.

    ``flash``: attention without its score matrix, as the projects' own requirements install it;
    else both score matrices (before and after softmax) of all units at once: an upper end.
    """
    tokens, pixels = _sequence(vision)
    hidden = tokens * vision.hidden * HALF
    kind = constants.vision_attention
    attention = hidden * kind["flash" if flash else "eager"]
    if not flash:
        attention += 2 * vision.heads * tokens * _scores(vision, tokens, units) * HALF
    wide = tokens * vision.intermediate * HALF
    mlp = 2 * hidden + (3 if vision.gated_mlp else 2) * wide
    return units * (pixels + max(attention, mlp))


def _layer(vision: VisionDims) -> Iterator[int]:
    """Elements of the tensors of one block that are large enough to matter."""
    hidden, inter = vision.hidden, vision.intermediate
    yield 3 * hidden * hidden
    yield hidden * hidden
    for _ in range(3 if vision.gated_mlp else 2):
        yield hidden * inter
    yield 8 * hidden + inter  # norms, biases, layer scales


def _held(sizes: Sequence[int], constants: LegacyConstants) -> int:
    """Bytes of torch's segments for so many tensors: large ones alone, others share segments."""
    block = constants.torch_block
    large = sum(round_up(size, block["page"]) for size in sizes if size >= block["large"])
    middle = sum(size for size in sizes if block["small"] < size < block["large"])
    small = sum(size for size in sizes if size <= block["small"])
    return large + round_up(middle, block["segment"]) + round_up(small, block["page"])


def _sequence(vision: VisionDims) -> tuple[int, int]:
    """Tokens and pixel bytes of one unit."""
    pixels = vision.channels * vision.temporal_patch * HALF
    if vision.image_size is None:
        return 1, pixels * vision.patch_size**2
    return vision_side(vision) ** 2 + 1, pixels * vision.image_size**2


def _scores(vision: VisionDims, tokens: int, units: int) -> int:
    """Columns of the score matrix: a tile's own tokens, or every patch of the request."""
    return tokens if vision.image_size is not None else units
