"""A vision tower's work for an image, and how often it encodes the same image.

The work of matrix products grows with the number of tokens. The work of attention grows with the
square of the number of tokens that attend to each other: those of the whole image, of one tile, or
of one window of patches. TurboMind encodes the whole image in each forward that contains one of its
tokens. The check of a start and the forecast of a plan share this model.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from msgspec.structs import replace

from turbofit.core.model import Model
from turbofit.core.struct import Struct
from turbofit.core.units import round_up

#: Tokens of a chat's prompt before its images: a typical number, rather too large.
BEFORE: Final = 32
#: Tokens of a chat's prompt after its images: likewise.
_AFTER: Final = 32
#: By kind of tower, two numbers: the layers of which one attends over the whole image, and the
#: patches in a window, over which each other layer attends. Source:
#: ``fullatt_block_indexes`` and ``window_size`` of the published Qwen2.5-VL.
_WINDOWED: Final = {"qwen2_5vit": (8, 64)}


class Tower(Struct):
    """One rank's share of a vision tower's work, in FLOPs.

    ``unit_flops`` are for the products of one vision unit, ``pair_flops`` for the attention of one
    token to another, ``window_flops`` for the attention of one unit in its window. A unit has
    ``tokens`` tokens. The tokens attend to all tokens of the image if ``whole``, else to the tokens
    of their unit.
    """

    unit_flops: float = 0.0
    pair_flops: float = 0.0
    window_flops: float = 0.0
    tokens: int = 1
    whole: bool = False
    encodes_again: bool = False

    def attention_flops(self, units: float) -> float:
        """Return the attention FLOPs for one image of ``units`` vision units."""
        sequence, times = (self.tokens * units, 1.0) if self.whole else (self.tokens, units)
        return self.pair_flops * times * sequence**2 + self.window_flops * units

    @property
    def plain(self) -> Tower:
        """The same tower as if its attention took no time, which is nearly true of small images."""
        return replace(self, pair_flops=0.0, window_flops=0.0)

    def encodings(self, place: float, tokens: float, forward: int, images: int = 1) -> int:
        """Return how many image encodings a prompt needs; its images have ``tokens`` together.

        The first image begins at token ``place`` of the prompt. Each image is encoded once, and
        once more for each edge between forwards of ``forward`` tokens that cuts it. The number may
        be too high: the text around images counts with the length of a chat's template.
        """
        if not self.encodes_again or not images:
            return images
        edges = ceil((place + tokens + _AFTER) / forward) - int(place // forward) - 1
        return images + edges


def whole_image_prefill(tokens: int) -> int:
    """Return the tokens of a forward that holds an image of ``tokens`` tokens and a chat's text."""
    return round_up(BEFORE + tokens + _AFTER, 64)


def tower_of(model: Model, held: float, sharded: float, *, encodes_again: bool) -> Tower:
    """Return one rank's share of the work of a model's vision tower.

    ``held`` are the bytes of the tower on the rank; attention is divided by ``sharded`` ranks. Each
    2-byte weight counts two FLOPs for each token.
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
