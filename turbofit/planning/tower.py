"""A vision tower's work for an image, and how often it encodes the same image.

The work of products grows with the image. That of attention grows with the square of its span: all
patches of an image, one tile, or one window of patches. TurboMind encodes the whole image in each
forward that contains one of its tokens. The check of a start and the forecast of a plan share this
model.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.struct import Struct
from turbofit.core.units import round_up

if TYPE_CHECKING:
    from turbofit.core.model import Model

#: Tokens of a chat's prompt before its images, and after them: typical, and rather too many.
BEFORE: Final = 32
_AFTER: Final = 32
#: One of so many layers of these towers attends over the whole image, the others over windows of so
#: many patches. Source: ``fullatt_block_indexes`` and ``window_size`` of the published Qwen2.5-VL.
_WINDOWED: Final = {"qwen2_5vit": (8, 64)}


class Tower(Struct):
    """One rank's share of a tower, in FLOPs.

    ``unit_flops`` are products for one unit. ``pair_flops`` are the attention of one token to
    another, ``window_flops`` that of one unit in its window. A unit has so many ``tokens``, which
    attend to those of the ``whole`` image or of their unit.
    """

    unit_flops: float = 0.0
    pair_flops: float = 0.0
    window_flops: float = 0.0
    tokens: int = 1
    whole: bool = False
    encodes_again: bool = False

    def attention_flops(self, units: float) -> float:
        """The attention FLOPs for one image of so many units."""
        sequence, times = (self.tokens * units, 1.0) if self.whole else (self.tokens, units)
        return self.pair_flops * times * sequence**2 + self.window_flops * units

    @property
    def plain(self) -> Tower:
        """The same tower without attention, as for images so small that it takes no time."""
        return replace(self, pair_flops=0.0, window_flops=0.0)

    def encodings(self, place: float, tokens: float, forward: int, images: int = 1) -> int:
        """How often all images of a prompt, of so many tokens together, are encoded.

        The first image begins at token ``place`` of a prompt. Each is encoded once, and again for
        each edge of a forward that cuts it. The number may be too high: the text around them counts
        with the length of a chat's template.
        """
        if not self.encodes_again or not images:
            return images
        edges = ceil((place + tokens + _AFTER) / forward) - int(place // forward) - 1
        return images + edges


def whole_image_prefill(tokens: int) -> int:
    """The tokens of a forward that contains one image of so many tokens, and a chat's text."""
    return round_up(BEFORE + tokens + _AFTER, 64)


def tower_of(model: Model, held: float, sharded: float, *, encodes_again: bool) -> Tower:
    """The tower of a model; a rank holds ``held`` bytes of its weights, a ``sharded``-th part.

    Each 2-byte weight counts two FLOPs for each token.
    """
    vision, rule = model.vision, model.image_rule
    if vision is None or rule is None:
        return Tower()
    layers, window = _WINDOWED.get(vision.kind, (1, 0))
    whole_layers = vision.layers / layers
    pair_flops = 4.0 * vision.hidden / sharded
    return Tower(
        unit_flops=held * model.unit_tower_tokens,
        pair_flops=pair_flops * whole_layers,
        window_flops=pair_flops * (vision.layers - whole_layers) * window,
        tokens=model.unit_tower_tokens,
        whole=rule.whole_image,
        encodes_again=encodes_again,
    )
