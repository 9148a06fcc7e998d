"""Image rules: how a model's images become units of its vision tower, and tokens.

Each file has one rule. Add a new rule to ``AnyImageRule``, too; no other code distinguishes rules.
"""

from __future__ import annotations

from turbofit.core.images.anyres import AnyresRule
from turbofit.core.images.canvas import CanvasRule
from turbofit.core.images.cross import CrossRule
from turbofit.core.images.hd import HdRule
from turbofit.core.images.longest_edge import LongestEdgeRule
from turbofit.core.images.navit import NavitRule
from turbofit.core.images.patch import PatchRule
from turbofit.core.images.rule import ImageRule
from turbofit.core.images.tile import TileRule
from turbofit.core.images.video import VideoRule

__all__ = [
    "AnyImageRule", "AnyresRule", "CanvasRule", "CrossRule", "HdRule", "ImageRule",
    "LongestEdgeRule", "NavitRule", "PatchRule", "TileRule", "VideoRule",
]  # fmt: skip

#: The rules that a JSON document can hold.
AnyImageRule = (
    TileRule
    | AnyresRule
    | CanvasRule
    | CrossRule
    | HdRule
    | LongestEdgeRule
    | NavitRule
    | PatchRule
)
