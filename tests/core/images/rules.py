"""One rule of each kind, and InternVL's with the fields of a client."""

from __future__ import annotations

from hypothesis import strategies as st
from msgspec.structs import replace

from turbofit.core.images import (
    AnyresRule,
    CanvasRule,
    CrossRule,
    HdRule,
    ImageRule,
    LongestEdgeRule,
    NavitRule,
    PatchRule,
    TileRule,
)

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, client_knobs=False)
ASKED = replace(TILES, client_knobs=True)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12_845_056)
SQUARE = TileRule.square(336, 576)
PAGES = HdRule(tile_size=336, tokens_per_tile=144, max_dynamic_patch=16)
CROSS = CrossRule(tile_size=560, tokens_per_tile=1601, max_dynamic_patch=4, thumbnail=False)
GRIDS = AnyresRule(
    tile_size=336, tokens_per_tile=576, max_dynamic_patch=4,
    grids=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)  # fmt: skip
CANVAS = CanvasRule(tile_size=336, tokens_per_tile=145, max_dynamic_patch=16)
LONGEST = LongestEdgeRule(tile_size=384, tokens_per_tile=81, max_dynamic_patch=16)
BUDGET = NavitRule(patch_size=14, merge=2, max_pixels=16384 * 14**2)
RULES: list[ImageRule] = [
    TILES, ASKED, PATCHES, replace(PATCHES, client_knobs=False), SQUARE,
    PAGES, CROSS, GRIDS, CANVAS, LONGEST, BUDGET,
]  # fmt: skip
#: Pixels along a side of an image.
side = st.integers(1, 6000)
